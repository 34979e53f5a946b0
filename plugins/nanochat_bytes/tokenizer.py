"""The tokenizer ``bytes``: a token is a byte of the text's UTF-8.

Two lone halves of a surrogate pair can't be written in UTF-8: text is read as if they were U+FFFD.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from nanochat_bytes.config import BytesConfig
from nanochat_core import CheckpointError, Tokenizer, TokenizerContext, Tokens

BYTES = 256
SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
SPECIAL_IDS = {name: BYTES + i for i, name in enumerate(SPECIAL_TOKENS)}
TOKENS = dict(enumerate([*(bytes([i]) for i in range(BYTES)), *(name.encode() for name in SPECIAL_TOKENS)]))
SETTINGS = "tokenizer.json"
CONTENT = {
    "format": "nanochat-bytes-1",
    "vocab_size": len(TOKENS),
    "special_tokens": SPECIAL_IDS,
}


class ByteTokenizer(Tokenizer):
    """Token i below 256 is the byte i; the special tokens follow."""

    @property
    def vocab_size(self) -> int:
        return len(TOKENS)

    @property
    def special_tokens(self) -> Mapping[str, int]:
        return SPECIAL_IDS

    def encode(self, text: str) -> list[int]:
        return list(_utf8(text))

    def encode_documents(self, texts: Sequence[str]) -> list[Tokens]:
        bos = np.array([self.bos_id], dtype=np.int32)
        return [np.concatenate((bos, np.frombuffer(_utf8(text), dtype=np.uint8))) for text in texts]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join([TOKENS[int(i)] for i in ids])

    def token_bytes(self) -> Tokens:
        return np.array([1] * BYTES + [0] * len(SPECIAL_TOKENS), dtype=np.int32)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(CONTENT).encode()).hexdigest()

    def save(self, directory: Path) -> None:
        """Write ``tokenizer.json``: for readers only, there is nothing to restore."""
        (directory / SETTINGS).write_text(json.dumps(CONTENT, indent=2) + "\n", encoding="utf-8", newline="\n")


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()


def build(config: BytesConfig, context: TokenizerContext) -> ByteTokenizer:
    """The tokenizer.

    Raises:
        CheckpointError: when ``context.saved`` holds another tokenizer.
    """
    if context.saved is not None:
        try:
            same = json.loads((context.saved / SETTINGS).read_text(encoding="utf-8")) == CONTENT
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"the tokenizer in {context.saved} can't be read ({error}); restore {SETTINGS} or start a new run"
            ) from error
        if not same:
            raise CheckpointError(
                f'{context.saved / SETTINGS} is not of this version\'s tokenizer "bytes"; start a new run'
            )
    return ByteTokenizer()
