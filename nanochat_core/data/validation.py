"""Validation rows: a fixed list, dealt by row and padded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from nanochat_core.data.packing import CHUNK, encode_documents
from nanochat_core.errors import DataError
from nanochat_core.interfaces.tokenizer import Tokenizer
from nanochat_core.interfaces.types import IGNORED, Batch, Tokens


def validation_rows(
    documents: Sequence[str], tokenizer: Tokenizer, tokens: int, max_seq_len: int
) -> tuple[Tokens, Tokens]:
    """The first ``tokens`` tokens of a split in one stream lane, cut into rows: a fixed list.

    Args:
        documents: all documents of the split, read once from the start, no further than needed.
        tokens: rounded down to whole rows, at least one; if the split has fewer, the last row is padded.

    Returns:
        ids (padded with 0) and targets (padded with ``IGNORED``), both int32 [n, T].

    Raises:
        DataError: when the split holds nothing to predict.
    """
    needed = max(tokens // max_seq_len, 1) * max_seq_len + 1
    parts: list[Tokens] = []
    have = 0
    for start in range(0, len(documents), CHUNK):
        chunk = encode_documents(tokenizer, documents[start : start + CHUNK])
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


class ValidationRows:
    """This rank's share of a fixed list of rows: row i goes to rank i % R.

    Each iteration gives the same batches, always [B, T], on the CPU, padded with rows of ``IGNORED`` targets so that
    every rank has the same number. The documents are tokenized on the first iteration; the rank's rows stay in memory.

    Args:
        documents: all documents of the split.
        tokens: how many of the split's first tokens to take; see ``packing.validation_rows``.
    """

    def __init__(
        self,
        documents: Sequence[str],
        tokenizer: Tokenizer,
        *,
        tokens: int,
        max_seq_len: int,
        device_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._documents, self._tokenizer = documents, tokenizer
        self._tokens, self._max_seq_len = tokens, max_seq_len
        self._device_batch_size, self._rank, self._world_size = device_batch_size, rank, world_size
        self._share: tuple[Tokens, Tokens] | None = None

    def _rows(self) -> tuple[Tokens, Tokens]:
        """ids and targets of this rank, int32 [whole batches x B, T]."""
        if self._share is None:
            ids, targets = validation_rows(self._documents, self._tokenizer, self._tokens, self._max_seq_len)
            B = self._device_batch_size
            most = -(-len(ids) // self._world_size)  # rows of rank 0; no rank has more
            padded = -(-most // B) * B
            mine = slice(self._rank, None, self._world_size)
            self._share = pad_rows(ids[mine], padded, 0), pad_rows(targets[mine], padded, IGNORED)
        return self._share

    def __len__(self) -> int:
        """Number of batches, the same on every rank."""
        return len(self._rows()[0]) // self._device_batch_size

    def __iter__(self) -> Iterator[Batch]:
        ids, targets = self._rows()
        B = self._device_batch_size
        for start in range(0, len(ids), B):
            pair = ids[start : start + B], targets[start : start + B]
            yield Batch(*(torch.from_numpy(part.astype(np.int64)) for part in pair))


def pad_rows(rows: Tokens, count: int, value: int) -> Tokens:
    """``rows`` [n, T], padded with rows of ``value`` to [count, T]."""
    return np.concatenate((rows, np.full((count - len(rows), rows.shape[1]), value, dtype=np.int32)))
