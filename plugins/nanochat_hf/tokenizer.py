"""The tokenizer ``hf``: a tokenizer of transformers, for evaluation. It is neither trained nor exact to the byte."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from nanochat_core import ConfigError, Tokenizer, TokenizerContext, Tokens
from nanochat_hf.config import HFConfig


def _alphabet() -> dict[str, int]:
    """GPT-2's alphabet: bytes by the character that spells them. Those without a printable character of their own are
    spelt by the characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


ALPHABET = _alphabet()


class HFTokenizer(Tokenizer):
    """A tokenizer of transformers. ``<|bos|>`` is its bos, or its eos if it has no bos.

    Args:
        theirs: the tokenizer of transformers.

    Raises:
        ConfigError: when it has neither bos nor eos.
    """

    def __init__(self, theirs: Any) -> None:
        self._theirs = theirs
        bos = theirs.bos_token_id if theirs.bos_token_id is not None else theirs.eos_token_id
        if bos is None:
            raise ConfigError(
                "this tokenizer has neither bos nor eos, one of which must precede a text; choose another model",
                key="path",
            )
        self._special = {str(theirs.convert_ids_to_tokens(i)): int(i) for i in theirs.all_special_ids}
        self._special["<|bos|>"] = int(bos)
        self._byte_level = any(name.startswith("\u0120") for name in theirs.get_vocab())
        self._by_pieces = self._byte_level or any("\u2581" in name for name in theirs.get_vocab())
        self._names = set(self._special.values())

    @property
    def vocab_size(self) -> int:
        return len(self._theirs)

    @property
    def special_tokens(self) -> Mapping[str, int]:
        return self._special

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def encode_documents(self, texts: Sequence[str]) -> list[Tokens]:
        batch = self._theirs(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [np.array([self.bos_id, *ids], dtype=np.int32) for ids in batch]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        if self._by_pieces:  # each token by itself: parts of characters and spaces at the beginning stay as they are
            pieces = self._theirs.convert_ids_to_tokens(list(ids))
            return b"".join(
                piece.encode() if i in self._names else self._bytes(piece)
                for i, piece in zip(ids, pieces, strict=True)
                if piece is not None
            )
        text: str = self._theirs.decode(list(ids), clean_up_tokenization_spaces=False)
        return text.encode()

    def token_bytes(self) -> Tokens:
        """Number of bytes of each token's text, int32 [V]; 0 for special tokens."""
        special = set(self._special.values())
        pieces = self._theirs.convert_ids_to_tokens(list(range(self.vocab_size)))
        sizes = [0 if i in special or piece is None else len(self._bytes(piece)) for i, piece in enumerate(pieces)]
        return np.array(sizes, dtype=np.int32)

    def _bytes(self, piece: str) -> bytes:
        if piece.startswith("<0x") and piece.endswith(">") and len(piece) == 6:
            return bytes([int(piece[3:5], 16)])  # a byte of a sentencepiece tokenizer
        if "\u2581" in piece:
            return piece.replace("\u2581", " ").encode()
        # Byte-level tokenizers spell each byte as one character; others, and added tokens, spell the text itself.
        if self._byte_level and all(character in ALPHABET for character in piece):
            return bytes(ALPHABET[character] for character in piece)
        return piece.encode()

    def save(self, directory: Path) -> None:
        self._theirs.save_pretrained(directory)

    @property
    def fingerprint(self) -> str:
        vocabulary = sorted(self._theirs.get_vocab().items())
        return hashlib.sha256(json.dumps([vocabulary, self.bos_id]).encode()).hexdigest()


def build(config: HFConfig, context: TokenizerContext) -> HFTokenizer:
    """Load the tokenizer.

    Raises:
        ConfigError: when transformers can't load it.
    """
    source: str | Path = context.saved if context.saved is not None else config.path
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(
            source, gguf_file=config.gguf_file, revision=config.revision or "main"
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ConfigError(f"transformers can't load {source}: {error}", key="path") from error
    return HFTokenizer(theirs)
