"""Rows of tokens as a pure function of documents and a cursor.

Document k of lane s is document s + k S of the data source. Two packings:

- ``stream`` lays the documents of a lane end to end, each led by bos, epoch after epoch, and cuts the stream into rows:
  T + 1 tokens each, one shared with the next row, so that every token but the very first is a target once.
- ``best_fit`` packs windows of documents, each window by itself. A row of T + 1 tokens starts with a document's bos and
  shares nothing; documents that don't fit are cropped, and the tokens lost are counted.

A row depends only on the documents from its cursor on. G rows per step, S lanes, T tokens per row.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import attrs
import numpy as np
import numpy.typing as npt

from nanochat_core.errors import CheckpointError, DataError
from nanochat_core.files import shorten
from nanochat_core.interfaces.tokenizer import Tokenizer
from nanochat_core.interfaces.types import Tokens
from nanochat_core.plugins.calls import breaks, plugin_call, title_of

MAX_LANES = 64
CHUNK = 16  # documents read and tokenized at once: slices are cheaper than single documents
WINDOW = 64  # documents that best_fit packs together
WINDOWS_A_LANE = 4  # windows that an epoch of a lane should hold

Packing = Literal["stream", "best_fit"]


class TokenSource(Protocol):
    """Documents as tokens."""

    def __len__(self) -> int:
        """Number of documents."""

    def read(self, indices: range) -> Sequence[Tokens]:
        """Tokens of each document, integers led by bos. Any thread may call it."""


@attrs.frozen
class Encoder:
    """Documents that are tokenized on demand."""

    documents: Sequence[str]
    tokenizer: Tokenizer

    def __len__(self) -> int:
        return len(self.documents)

    def read(self, indices: range) -> Sequence[Tokens]:
        return encode_documents(self.tokenizer, self.documents[indices.start : indices.stop : indices.step])


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> Sequence[Tokens]:
    """Return the tokens of each text, led by bos. What the tokenizer returns is checked, which costs little.

    Raises:
        PluginError: when these are not tokens of its vocabulary.
    """
    with plugin_call(f"{title_of(tokenizer)} failed"):
        made = tokenizer.encode_documents(texts)
        if len(made) != len(texts):
            raise breaks(tokenizer, f"encode_documents gives {len(made)} documents for {len(texts)} texts")
        for tokens in made:
            if not (isinstance(tokens, np.ndarray) and tokens.dtype.kind in "iu" and tokens.ndim == 1 and len(tokens)):
                raise breaks(tokenizer, f"encode_documents must give int32 arrays led by bos, not {shorten(tokens)}")
            if int(tokens.min()) < 0 or int(tokens.max()) >= tokenizer.vocab_size:
                wrong = tokens[(tokens < 0) | (tokens >= tokenizer.vocab_size)][0]
                raise breaks(tokenizer, f"encode gives the id {wrong}, outside [0, {tokenizer.vocab_size})")
    return made


class Cursor(NamedTuple):
    """Where the next row of a lane starts.

    Args:
        epoch: passes over the lane that are complete.
        document: document of the lane, counted within it; for ``best_fit`` the first one of a window.
        offset: tokens of that document (bos included) that lie before the row; for ``best_fit`` the window's rows.
    """

    epoch: int = 0
    document: int = 0
    offset: int = 0


class Rows(NamedTuple):
    """Rows, and the tokens lost before each.

    Args:
        tokens: int32 [n, T + 1]: ids are ``row[:-1]``, targets ``row[1:]``.
        cropped: int64 [n], tokens cut off documents so that they end with the row.
        dropped: int64 [n], tokens of unfinished last rows of windows.
    """

    tokens: Tokens
    cropped: npt.NDArray[np.int64]
    dropped: npt.NDArray[np.int64]

    def part(self, start: int, stop: int) -> Rows:
        return Rows(self.tokens[start:stop], self.cropped[start:stop], self.dropped[start:stop])


def join(parts: Sequence[Rows]) -> Rows:
    """All rows of ``parts``, in order."""
    if len(parts) == 1:
        return parts[0]
    tokens, cropped, dropped = zip(*parts, strict=True)
    return Rows(np.concatenate(tokens), np.concatenate(cropped), np.concatenate(dropped))


def lanes(rows_per_step: int, num_documents: int, packing: Packing = "stream", window: int = WINDOW) -> int:
    """S: the largest power of two that divides G, is at most 64, and leaves enough documents to each lane (or 1).

    That is 8 documents for ``stream``, and several windows for ``best_fit``.
    """
    least = 8 if packing == "stream" else WINDOWS_A_LANE * window
    count = math.gcd(rows_per_step, MAX_LANES)
    while count > 1 and num_documents // count < least:
        count //= 2
    return count


START = Cursor()


class Lane(ABC):
    """One lane of a split, from a cursor on.

    Args:
        source: all documents of the split.
        max_seq_len: T.
        lane, lanes: index of the lane, and number of lanes.
        cursor: where the next row starts.
        epochs: passes over the lane that may be made; None for any number.
        window: documents that ``best_fit`` packs together.

    Raises:
        DataError: when the lane has no documents.
        CheckpointError: when the cursor points at a document, token or row that does not exist; also from
            ``next_rows``.
    """

    def __init__(
        self,
        source: TokenSource,
        max_seq_len: int,
        lane: int = 0,
        lanes: int = 1,
        cursor: Cursor = START,
        epochs: int | None = None,
        window: int = WINDOW,
    ) -> None:
        self._source, self._T, self._lane, self._lanes, self._window = source, max_seq_len, lane, lanes, window
        self._epochs = math.inf if epochs is None else epochs
        self.num_documents = len(range(lane, len(source), lanes))
        if self.num_documents == 0:
            raise DataError(f"{len(source)} training documents are too few for {lanes} lanes; give more data")
        if not 0 <= cursor.document < self.num_documents:
            raise self._misplaced(cursor)
        self._next = cursor  # first document (or window) that is not prepared
        self._begin()

    @abstractmethod
    def _begin(self) -> None:
        """Start at ``_next`` with nothing prepared."""

    def _misplaced(self, cursor: Cursor) -> CheckpointError:
        return CheckpointError(
            f"lane {self._lane} can't continue at {cursor}, there is no such document, token or row: "
            f"the data source or the tokenizer differs from the one that the run was started with"
        )

    def _read(self, first: int, last: int) -> Sequence[Tokens]:
        """Tokens of documents [first, last) of the lane."""
        return self._source.read(range(self._lane + first * self._lanes, self._lane + last * self._lanes, self._lanes))

    @property
    @abstractmethod
    def cursor(self) -> Cursor:
        """Where the next row starts."""

    @property
    def epoch(self) -> float:
        """Passes over the lane so far."""
        return self.cursor.epoch + self.cursor.document / self.num_documents

    def documents(self, start: Cursor, stop: Cursor) -> list[int]:
        """Documents of the source that the rows between two cursors are made of, ascending."""
        end = self._end(stop)
        if stop.epoch == start.epoch:
            mine = set(range(start.document, end))
        elif stop.epoch == start.epoch + 1:
            mine = {*range(start.document, self.num_documents), *range(end)}
        else:
            mine = set(range(self.num_documents))
        return [self._lane + document * self._lanes for document in sorted(mine)]

    @abstractmethod
    def _end(self, cursor: Cursor) -> int:
        """The first document of the lane of which no row before the cursor, in the same epoch, has tokens."""

    @abstractmethod
    def has(self, count: int) -> bool:
        """Whether there are ``count`` more rows within the epochs allowed; prepares them."""

    def next_rows(self, count: int) -> Rows:
        """The next ``count`` rows.

        Raises:
            DataError: when they would take another epoch and none is allowed.
        """
        if not self.has(count):
            raise DataError(
                f"the training data are used up, read {self._epochs} times: give more data or train for "
                f'fewer steps; to read them again, set data.epochs to "repeat" or a higher number',
                key="data.epochs",
            )
        return self._take(count)

    @abstractmethod
    def _take(self, count: int) -> Rows: ...


class StreamLane(Lane):
    """One lane of ``stream`` packing."""

    def _begin(self) -> None:
        self._ready: deque[tuple[Cursor, Tokens]] = deque()  # tokens from the lane's cursor on, by document
        self._num_ready = 0

    @property
    def cursor(self) -> Cursor:
        return self._ready[0][0] if self._ready else self._next

    def _end(self, cursor: Cursor) -> int:
        return cursor.document + (cursor.offset > 0)

    def has(self, count: int) -> bool:
        while self._num_ready < count * self._T + 1:
            if self._next.epoch >= self._epochs:
                return False
            self._prepare()
        return True

    def _prepare(self) -> None:
        epoch, first, offset = self._next
        last = min(first + CHUNK, self.num_documents)
        for document, tokens in enumerate(self._read(first, last), start=first):
            if offset >= len(tokens):
                raise self._misplaced(self._next)
            self._ready.append((Cursor(epoch, document, offset), tokens[offset:]))
            self._num_ready += len(tokens) - offset
            offset = 0
        self._next = Cursor(epoch, last) if last < self.num_documents else Cursor(epoch + 1)

    def _take(self, count: int) -> Rows:
        used = count * self._T
        parts: list[Tokens] = []
        length = 0
        for _, tokens in self._ready:
            parts.append(tokens[: used + 1 - length])
            length += len(parts[-1])
            if length > used:
                break
        flat = np.concatenate(parts, dtype=np.int32)
        self._drop(used)
        rows = np.lib.stride_tricks.sliding_window_view(flat, self._T + 1)[:: self._T]
        nothing = np.zeros(count, dtype=np.int64)
        return Rows(rows, nothing, nothing)

    def _drop(self, count: int) -> None:
        """Advance by ``count`` tokens, fewer than are ready."""
        self._num_ready -= count
        while count >= len(self._ready[0][1]):
            count -= len(self._ready.popleft()[1])
        (epoch, document, offset), tokens = self._ready[0]
        self._ready[0] = (Cursor(epoch, document, offset + count), tokens[count:])
