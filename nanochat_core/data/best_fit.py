"""Best-fit packing: every row begins with a document, and a document that fits in no row is cropped."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence

import numpy as np

from nanochat_core.data.packing import Cursor, Lane, Rows, join
from nanochat_core.errors import DataError
from nanochat_core.interfaces.types import Tokens


def best_fit(documents: Sequence[Tokens], capacity: int) -> tuple[Rows, int]:
    """Pack documents into rows of ``capacity`` tokens, each starting with a document.

    The largest document that still fits is placed (of equals the last). When none fits, the shortest (of equals the
    first) is cropped to fill the row, and its rest is lost. No padding: an unfinished last row is dropped.

    Returns:
        The rows, and the number of dropped tokens when there is no row that could count them; else the last row counts
        them.
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
    the work is spread evenly over the steps.
    """

    def _begin(self) -> None:
        self._starts = [w * self._window for w in range(max(self.num_documents // self._window, 1))]
        if self._next.document not in self._starts:
            raise self._misplaced(self._next)
        self._ready: deque[tuple[Cursor, Rows, int]] = deque()  # packed windows from the lane's cursor on
        self._num_ready = 0  # rows in them, from the cursor on
        self._offset = 0  # rows of the first of them that have been dealt
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
                    f"no {self._stop(0)} documents together fill a row of {self._T + 1} tokens: "
                    f'set data.packing to "stream", raise data.packing_window, or lower train.max_seq_len',
                    key="data.packing",
                )
        return True

    def _stop(self, start: int) -> int:
        """The document after the window that starts with document ``start``."""
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
        if offset > 0:  # only for the first window of a lane, when a run is resumed
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
        """Tokenize as large a part of the next window as has been dealt of this one."""
        if len(self._ready) == 1 and self._offset > 0:
            start = self._next.document
            dealt = self._offset / len(self._ready[0][1].tokens)
            self._tokenize(math.ceil((self._stop(start) - start) * dealt))
