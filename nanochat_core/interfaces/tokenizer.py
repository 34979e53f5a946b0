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
    """The context that the factory of a tokenizer receives.

    Args:
        documents: returns a new iterable over the training documents, for a tokenizer that must be trained.
        saved: directory that ``save`` of the same plugin wrote, from which to load instead of training; None: train.
    """

    documents: Callable[[], Iterable[str]]
    saved: Path | None = None


class Tokenizer(ABC):
    """A reversible mapping of text to tokens.

    A tokenizer that is trained must have an option ``vocab_size`` and exactly that many tokens, so that a run can be
    planned before the tokenizer is trained.
    """

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of tokens, special ones included; ids are in [0, vocab_size)."""

    @property
    @abstractmethod
    def special_tokens(self) -> Mapping[str, int]:
        """Ids of special tokens by name, among them ``<|bos|>``, with which every document begins."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without bos. Names of special tokens in the text are encoded as ordinary text."""

    @abstractmethod
    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the exact bytes of ``ids``; a special token gives its name."""

    @abstractmethod
    def token_bytes(self) -> Tokens:
        """Return the number of bytes of each token, int32 [V]; 0 for special tokens."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write all that is needed to load the tokenizer into an existing directory, as readable files, no pickles."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest of everything on which the tokens of a text depend."""

    @property
    def bos_id(self) -> int:
        """Id of ``<|bos|>``."""
        return self.special_tokens["<|bos|>"]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def encode_documents(self, texts: Sequence[str]) -> list[Tokens]:
        """Return an int32 array per document, each beginning with bos. Called from a background thread."""
        bos = self.bos_id
        return [np.array([bos, *self.encode(text)], dtype=np.int32) for text in texts]
