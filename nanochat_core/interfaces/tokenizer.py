"""The Tokenizer interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import attrs
import numpy as np

from nanochat_core.interfaces.types import Tokens


@attrs.frozen
class TokenizerContext:
    """Facts that the factory of a tokenizer gets.

    Args:
        documents: gives a fresh iterator over the training documents, for a tokenizer that must be trained.
        saved: a directory that ``save`` of the same plugin wrote: load from there instead of training.
    """

    documents: Callable[[], Iterable[str]]
    saved: Path | None = None


class Tokenizer(ABC):
    """Text to tokens and back.

    A tokenizer that is trained has an option ``vocab_size`` and delivers exactly that many tokens, so that a run can
    be planned before the training.
    """

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of tokens, special ones included; ids lie in [0, vocab_size)."""

    @property
    @abstractmethod
    def special_tokens(self) -> Mapping[str, int]:
        """Special tokens by name. Must hold ``<|bos|>``, which leads every document. Never parsed out of text."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Tokens of ``text``, without bos. Special-token strings inside the text are ordinary text."""

    @abstractmethod
    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The exact bytes of ``ids``; special tokens give their name."""

    @abstractmethod
    def token_bytes(self) -> Tokens:
        """[V] int32: number of raw bytes of each token, 0 for special ones."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write all that is needed to load it again, as readable files without pickles, into an existing directory."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest of everything that determines the tokens of a text."""

    @property
    def bos_id(self) -> int:
        return self.special_tokens["<|bos|>"]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def encode_documents(self, texts: Sequence[str]) -> list[Tokens]:
        """One int32 array per document, each led by bos. Called from a background thread."""
        bos = self.bos_id
        return [np.array([bos, *self.encode(text)], dtype=np.int32) for text in texts]
