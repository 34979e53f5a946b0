"""Rows of tokens as a pure function of documents and a cursor.

Document k of lane s is document s + k S of the data source. Two packings:

- ``stream`` lays the documents of a lane end to end, each led by bos, epoch after epoch, and cuts the stream into rows:
  T + 1 tokens each, one shared with the next row, so that every token but the very first is a target once.
- ``best_fit`` packs windows of documents, each window by itself. A row of T + 1 tokens starts with a document's bos and
  shares nothing; documents that don't fit are cropped, and what is lost is counted.

No row needs anything but the documents from its cursor on. G rows a step, S lanes, T tokens a row.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import attrs
import numpy as np
import numpy.typing as npt

from nanochat_core.errors import CheckpointError, DataError
from nanochat_core.interfaces.model import IGNORED, Tokenizer, Tokens

MAX_LANES = 64
CHUNK = 16  # documents read and tokenized at once: slices are cheaper than single documents
WINDOW = 64  # documents that best_fit packs together
WINDOWS_A_LANE = 4  # and how many windows of them an epoch of a lane should hold

Packing = Literal["stream", "best_fit"]


class TokenSource(Protocol):
    """Documents as tokens."""

    def __len__(self) -> int:
        """Number of documents."""

    def read(self, indices: range) -> Sequence[Tokens]:
        """Tokens of each document, integers led by bos. Any thread may call it."""


@attrs.frozen
class Encoder:
    """Documents, tokenized when they are asked for."""

    documents: Sequence[str]
    tokenizer: Tokenizer

    def __len__(self) -> int:
        return len(self.documents)

    def read(self, indices: range) -> Sequence[Tokens]:
        return self.tokenizer.encode_documents(self.documents[indices.start : indices.stop : indices.step])


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
    """Rows and what was lost on the way to each.

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
        lane, lanes: which of how many.
        cursor: where the next row starts.
        epochs: passes over the lane that may be made; None for any number.
        window: documents that ``best_fit`` packs together.

    Raises:
        DataError: when the lane has no documents.
        CheckpointError: (also from ``next_rows``) when the cursor points at what isn't there.
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
        self._next = cursor  # first document (or window) that isn't prepared yet
        self._begin()

    @abstractmethod
    def _begin(self) -> None:
        """Start at ``_next`` with nothing prepared."""

    def _misplaced(self, cursor: Cursor) -> CheckpointError:
        return CheckpointError(
            f"lane {self._lane} was to go on at {cursor}, but there is no such document, token or row: "
            f"the data source or the tokenizer isn't the one the run was started with"
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
        """Documents of the source that the rows between two cursors are made of, rising."""
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
        """The first document of the lane that no row before the cursor has to do with, but for earlier epochs."""

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
                f"data.epochs: the training data are used up, read {self._epochs} times: give more data or train for "
                f'fewer steps; to read them again, set data.epochs to "repeat" or a higher number'
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


def best_fit(documents: Sequence[Tokens], capacity: int) -> tuple[Rows, int]:
    """Pack documents into rows of ``capacity`` tokens, each starting with a document.

    The largest document that still fits is placed (of equals the last). When none fits, the shortest (of equals the
    first) is cropped to fill the row, and its rest is lost. No padding: an unfinished last row is dropped.

    Returns:
        The rows, and the number of tokens lost to no row, because there is none. Otherwise the last row counts what was
        dropped.
    """
    order = sorted(range(len(documents)), key=lambda i: len(documents[i]))
    lengths = [len(documents[i]) for i in order]
    pieces: list[Tokens] = []
    cropped: list[int] = []
    unfinished = 0
    while order:
        row: list[Tokens] = []
        room, lost = capacity, 0
        while room > 0 and order:
            best = max(bisect_right(lengths, room) - 1, 0)
            row.append(documents[order.pop(best)][:room])
            left_over = lengths.pop(best) - room
            lost += max(left_over, 0)
            room = max(-left_over, 0)
        if room > 0:
            unfinished = capacity - room
        else:
            pieces += row
            cropped.append(lost)
    if not pieces:
        none = np.empty(0, dtype=np.int64)
        return Rows(np.empty((0, capacity), dtype=np.int32), none, none), unfinished
    tokens = np.concatenate(pieces, dtype=np.int32).reshape(-1, capacity)
    dropped = np.zeros(len(cropped), dtype=np.int64)
    dropped[-1] = unfinished
    return Rows(tokens, np.array(cropped, dtype=np.int64), dropped), 0


class BestFitLane(Lane):
    """One lane of ``best_fit`` packing.

    Its documents are cut into windows of ``window``, each packed by itself; the last window takes what is left over,
    fewer than twice as many. While the rows of a window are dealt, the next window is tokenized bit by bit, so that
    the work comes evenly.
    """

    def _begin(self) -> None:
        self._starts = [w * self._window for w in range(max(self.num_documents // self._window, 1))]
        if self._next.document not in self._starts:
            raise self._misplaced(self._next)
        self._ready: deque[tuple[Cursor, Rows, int]] = deque()  # packed windows from the lane's cursor on
        self._num_ready = 0  # rows in them, from the cursor on
        self._offset = 0  # rows of the first of them that are dealt already
        self._tokens: list[Tokens] = []  # the first documents of the next window

    @property
    def cursor(self) -> Cursor:
        return self._ready[0][0]._replace(offset=self._offset) if self._ready else self._next

    def _end(self, cursor: Cursor) -> int:
        return self._stop(cursor.document) if cursor.offset > 0 else cursor.document

    def has(self, count: int) -> bool:
        tried = 0
        while self._num_ready < count:
            if self._next.epoch >= self._epochs:
                return False
            before = self._num_ready
            self._prepare()
            tried = tried + 1 if self._num_ready == before else 0
            if tried > len(self._starts):
                raise DataError(
                    f"data.packing: no {self._stop(0)} documents together fill a row of {self._T + 1} tokens: "
                    f'set data.packing to "stream", raise data.packing_window, or lower train.max_seq_len'
                )
        return True

    def _stop(self, start: int) -> int:
        """Where the window that starts with document ``start`` ends."""
        return self.num_documents if start == self._starts[-1] else start + self._starts[1]

    def _tokenize(self, count: int) -> None:
        """The first ``count`` documents of the next window."""
        first = self._next.document + len(self._tokens)
        last = self._next.document + count
        if last > first and self._next.epoch < self._epochs:
            self._tokens += self._read(first, last)

    def _prepare(self) -> None:
        """Pack the next window."""
        epoch, start, offset = self._next
        stop = self._stop(start)
        self._tokenize(stop - start)
        rows, lost = best_fit(self._tokens, self._T + 1)
        if offset > 0 and offset >= len(rows.tokens):
            raise self._misplaced(self._next)
        self._tokens = []
        if offset > 0:  # only the first window of a lane, where a run goes on
            self._offset = offset
        self._ready.append((Cursor(epoch, start), rows, lost))
        self._num_ready += len(rows.tokens) - offset
        self._next = Cursor(epoch, stop) if stop < self.num_documents else Cursor(epoch + 1)

    def _take(self, count: int) -> Rows:
        parts: list[Rows] = []
        carried = 0  # tokens of windows without a row
        self._num_ready -= count
        while count > 0:
            _, rows, lost = self._ready[0]
            part = rows.part(self._offset, self._offset + count)
            if len(part.tokens):
                parts.append(part._replace(dropped=np.array([part.dropped[0] + carried, *part.dropped[1:]])))
            carried = 0 if len(part.tokens) else carried + lost
            count -= len(part.tokens)
            self._offset += len(part.tokens)
            if self._offset == len(rows.tokens):
                self._ready.popleft()
                self._offset = 0
        self._tokenize_some()
        return join(parts)

    def _tokenize_some(self) -> None:
        """As large a part of the next window as is dealt of this one."""
        if len(self._ready) == 1 and self._offset > 0:
            start = self._next.document
            dealt = self._offset / len(self._ready[0][1].tokens)
            self._tokenize(math.ceil((self._stop(start) - start) * dealt))


def validation_rows(
    documents: Sequence[str], tokenizer: Tokenizer, tokens: int, max_seq_len: int
) -> tuple[Tokens, Tokens]:
    """The first ``tokens`` tokens of a split in one stream lane, cut into rows: a fixed list.

    Args:
        documents: all documents of the split, read once from the start, no further than needed.
        tokens: rounded down to whole rows, one at least; where the split has fewer, the last row is filled up.

    Returns:
        ids (filled up with 0) and targets (filled up with ``IGNORED``), both int32 [n, T].

    Raises:
        DataError: when the split holds nothing to predict.
    """
    needed = max(tokens // max_seq_len, 1) * max_seq_len + 1
    parts: list[Tokens] = []
    have = 0
    for start in range(0, len(documents), CHUNK):
        chunk = tokenizer.encode_documents(documents[start : start + CHUNK])
        parts += chunk
        have += sum(map(len, chunk))
        if have >= needed:
            break
    flat = np.concatenate(parts)[:needed] if parts else np.empty(0, dtype=np.int32)
    if len(flat) < 2:
        raise DataError(f"the split's {len(documents)} documents hold no text to predict; give more data")
    count = math.ceil((len(flat) - 1) / max_seq_len)
    ids, targets = np.zeros((2, count * max_seq_len), dtype=np.int32)
    targets[:] = IGNORED
    ids[: len(flat) - 1], targets[: len(flat) - 1] = flat[:-1], flat[1:]
    return ids.reshape(count, max_seq_len), targets.reshape(count, max_seq_len)
