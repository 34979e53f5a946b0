"""The Tokenizer interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import attrs
import numpy as np

from nanochat_core.files import shorten
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
        return [_as_tokens([bos, *self.encode(text)]) for text in texts]


def _as_tokens(ids: Sequence[int]) -> Tokens:
    """Return ids as int32. Raises ValueError for numbers that numpy would cut to whole numbers, or that don't fit."""
    array = np.array(ids)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(f"encode() must return a list of whole numbers, not of {array.dtype}")
    if len(array) and not -(2**31) <= int(array.min()) <= int(array.max()) < 2**31:
        raise ValueError("encode() must return ids in [0, vocab_size)")
    return array.astype(np.int32)


def vocabulary_problems(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the rules that a tokenizer breaks by what it says about its vocabulary, and by the tokens of a short text.

    What else it must keep takes longer to try: ``nanochat_core.testing.check_tokenizer``.
    """
    size, special = tokenizer.vocab_size, tokenizer.special_tokens
    if not _is_whole(size) or not 1 <= size < 2**31:
        yield f"vocab_size must be an int from 1 to {2**31 - 1}, not {shorten(size)}"
        return
    if not isinstance(special, Mapping) or not all(isinstance(name, str) for name in special):
        yield f"special_tokens must map names to ids, not {shorten(special)}"
        return
    if "<|bos|>" not in special:
        yield "it has no special token <|bos|>, which must lead every document"
    for name, token in special.items():
        if not _is_whole(token) or not 0 <= token < size:
            yield f"the id of the special token {shorten(name)} must be in [0, {size}), not {shorten(token)}"
    counts, fingerprint = tokenizer.token_bytes(), tokenizer.fingerprint
    if not (isinstance(counts, np.ndarray) and counts.dtype == np.int32 and counts.shape == (size,)):
        shown = f"{counts.dtype} {list(counts.shape)}" if isinstance(counts, np.ndarray) else shorten(counts)
        yield f"token_bytes() must be an int32 array of vocab_size = {size} numbers, not {shown}"
    elif int(counts.min()) < 0 or not counts.any():
        yield "token_bytes() must be the number of bytes of each token: none negative, and not all 0"
    if not (isinstance(fingerprint, str) and fingerprint and fingerprint.isprintable() and len(fingerprint) <= 200):
        yield f"fingerprint must be a hex digest of what its tokens depend on, not {shorten(fingerprint)}"
    ids = tokenizer.encode("a b")
    if not isinstance(ids, list) or not ids or not all(_is_whole(i) and 0 <= i < size for i in ids):
        yield f'encode("a b") must return a list of ids in [0, {size}), not {shorten(ids)}'
    elif not isinstance(text := tokenizer.decode_bytes(ids), bytes):
        yield f"decode_bytes() must return bytes, not {shorten(text)}"


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
