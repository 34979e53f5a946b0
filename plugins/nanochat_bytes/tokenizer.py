"""The tokenizer ``bytes``: each token is a byte of the text's UTF-8.

Unpaired surrogates can't be written in UTF-8: each is read as U+FFFD.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import numpy as np

from nanochat_bytes.config import BytesConfig
from nanochat_core import (
    TableTokenizer,
    TokenizerContext,
    Tokens,
    load_table_tokenizer,
    special_tokens_from,
    well_formed,
)

BYTES = 256


class ByteTokenizer(TableTokenizer):
    """A tokenizer whose token i below 256 is the byte i; the special tokens follow."""

    format = "nanochat-bytes-1"

    def __init__(self) -> None:
        super().__init__([bytes([i]) for i in range(BYTES)], special_tokens_from(BYTES))

    def encode_array(self, text: str) -> Tokens:
        return np.frombuffer(well_formed(text).encode(), dtype=np.uint8).astype(np.int32)

    @property
    def fingerprint(self) -> str:
        content = {"format": self.format, "vocab_size": self.vocab_size, "special_tokens": self.special_tokens}
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def files(self) -> Mapping[str, bytes]:
        return {}


def build(config: BytesConfig, context: TokenizerContext) -> ByteTokenizer:
    """Build the tokenizer.

    Raises:
        CheckpointError: when ``context.saved`` holds a different tokenizer.
    """
    if context.saved is not None:
        return load_table_tokenizer(ByteTokenizer, context.saved, lambda _: ByteTokenizer())
    return ByteTokenizer()
