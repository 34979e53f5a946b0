"""Rows of tokens as a pure function of documents and a cursor.

Document k of lane s is document s + k S of the data source. ``stream`` packing lays the documents of a lane end to end,
each led by bos, epoch after epoch, and cuts the stream into rows: T + 1 tokens each, one shared with the next row, so
that every token but the very first is a target once. No row needs anything but the documents from its cursor on.

G rows a step, S lanes, T tokens a row.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nanochat_core.errors import CheckpointError, DataError
from nanochat_core.interfaces import IGNORED, Tokenizer, Tokens

MAX_LANES = 64
CHUNK = 16  # documents read and tokenized at once: slices are cheaper than single documents


class Cursor(NamedTuple):
    """Where the next row of a lane starts.

    Args:
        epoch: passes over the lane that are complete.
        document: document of the lane, counted within it.
        offset: tokens of that document (bos included) that lie before the row.
    """

    epoch: int = 0
    document: int = 0
    offset: int = 0


def lanes(rows_per_step: int, num_documents: int, *, least: int = 8) -> int:
    """S: the largest power of two that divides G, is at most 64, and leaves ``least`` documents to each lane (or 1)."""
    count = math.gcd(rows_per_step, MAX_LANES)
    while count > 1 and num_documents // count < least:
        count //= 2
    return count


START = Cursor()


class StreamLane:
    """One lane of ``stream`` packing, from a cursor on.

    Args:
        documents: all documents of the split.
        tokenizer: gives each document's tokens, led by bos.
        lane, lanes: which of how many.
        cursor: where the next row starts.

    Raises:
        DataError: when the lane has no documents.
        CheckpointError: (also from ``next_rows``) when the cursor points at what isn't there.
    """

    def __init__(
        self, documents: Sequence[str], tokenizer: Tokenizer, lane: int = 0, lanes: int = 1, cursor: Cursor = START
    ) -> None:
        self._documents, self._tokenizer, self._lane, self._lanes = documents, tokenizer, lane, lanes
        self.num_documents = len(range(lane, len(documents), lanes))
        if self.num_documents == 0:
            raise DataError(f"{len(documents)} training documents are too few for {lanes} lanes; give more data")
        if not 0 <= cursor.document < self.num_documents:
            raise self._misplaced(cursor)
        self._next = cursor  # first document that isn't tokenized yet; its offset is cut off when it is
        self._ready: deque[tuple[Cursor, Tokens]] = deque()  # tokens from the lane's cursor on, by document

    def _misplaced(self, cursor: Cursor) -> CheckpointError:
        return CheckpointError(
            f"lane {self._lane} was to go on at {cursor}, but there is no such document or token: "
            f"the data source or the tokenizer isn't the one the run was started with"
        )

    @property
    def cursor(self) -> Cursor:
        """Where the next row starts."""
        return self._ready[0][0] if self._ready else self._next

    @property
    def epoch(self) -> float:
        """Passes over the lane so far."""
        return self.cursor.epoch + self.cursor.document / self.num_documents

    def next_rows(self, count: int, max_seq_len: int) -> Tokens:
        """The next ``count`` rows, int32 [count, T + 1]: ids are ``row[:-1]``, targets ``row[1:]``."""
        needed = count * max_seq_len + 1
        missing = needed - sum(len(tokens) for _, tokens in self._ready)
        while missing > 0:
            missing -= self._tokenize()
        flat = np.concatenate([tokens for _, tokens in self._ready])
        self._drop(needed - 1)
        rows = np.lib.stride_tricks.sliding_window_view(flat[:needed], max_seq_len + 1)[::max_seq_len]
        return np.ascontiguousarray(rows)

    def _tokenize(self) -> int:
        """Make the next documents ready. Returns how many tokens that gave."""
        epoch, first, offset = self._next
        last = min(first + CHUNK, self.num_documents)
        texts = self._documents[self._lane + first * self._lanes : self._lane + last * self._lanes : self._lanes]
        total = 0
        for document, tokens in enumerate(self._tokenizer.encode_documents(texts), start=first):
            if offset >= len(tokens):
                raise self._misplaced(self._next)
            self._ready.append((Cursor(epoch, document, offset), tokens[offset:]))
            total += len(tokens) - offset
            offset = 0
        self._next = Cursor(epoch, last) if last < self.num_documents else Cursor(epoch + 1)
        return total

    def _drop(self, count: int) -> None:
        """Advance by ``count`` tokens, fewer than are ready."""
        while count >= len(self._ready[0][1]):
            count -= len(self._ready.popleft()[1])
        (epoch, document, offset), tokens = self._ready[0]
        self._ready[0] = (Cursor(epoch, document, offset + count), tokens[count:])


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
