"""Tokens and rows of a set of texts other than the run's own data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from nanochat_bpb.config import TextSet
from nanochat_core import IGNORED, Batch, DataError, EvaluatorContext, Tokens

DOCUMENTS_PER_BATCH = 64  # documents tokenized together


def documents(path: Path) -> Iterator[str]:
    """Texts of a set, in the order of their files.

    Raises:
        DataError: when a file can't be read, naming it.
    """
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    for file in files:
        try:
            if file.suffix == ".jsonl":
                with file.open(encoding="utf-8") as lines:
                    yield from (json.loads(line)["text"] for line in lines if line.strip())
            elif file.suffix == ".parquet":
                import pyarrow.parquet as pq

                for batch in pq.ParquetFile(file).iter_batches(columns=["text"]):
                    yield from batch.column(0).to_pylist()
            else:
                yield file.read_text(encoding="utf-8")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file} can't be read ({error!r}): correct or remove it", key="sets") from error


def tokens_of(chosen: TextSet, context: EvaluatorContext, limit: int) -> Tokens:
    """The first ``limit`` + 1 tokens of a set, int32: documents one after the other, each led by bos.

    Raises:
        DataError: when a file can't be read, or there is no text.
    """
    parts: list[Tokens] = []
    count = 0
    pending: list[str] = []

    def encode() -> int:
        parts.extend(context.tokenizer.encode_documents(pending))
        added = sum(len(part) for part in parts[-len(pending) :])
        pending.clear()
        return added

    for text in documents(chosen.path):
        pending.append(text)
        if len(pending) == DOCUMENTS_PER_BATCH:
            count += encode()
            if count > limit:
                break
    if pending:
        encode()
    if not parts:
        raise DataError(f"there is no text in {chosen.path}: set the path to files with text", key="sets")
    return np.concatenate(parts)[: limit + 1].astype(np.int32)


def rows_of(tokens: Tokens, context: EvaluatorContext) -> Iterator[Batch]:
    """This rank's rows as batches of ids and targets, each int64 [device_batch_size, max_seq_len].

    Over all ranks, each token but the first is a target once. Rows are padded with the target ``IGNORED``.
    """
    B, T, world = context.device_batch_size, context.max_seq_len, context.world
    count = -(-(len(tokens) - 1) // T)
    mine = range(world.rank, count, world.size)
    for first in range(0, len(mine), B):
        ids_BT, targets_BT = np.zeros((B, T), dtype=np.int64), np.full((B, T), IGNORED, dtype=np.int64)
        for b, row in enumerate(mine[first : first + B]):
            piece = tokens[row * T : (row + 1) * T + 1]
            ids_BT[b, : len(piece) - 1], targets_BT[b, : len(piece) - 1] = piece[:-1], piece[1:]
        yield Batch(torch.from_numpy(ids_BT), torch.from_numpy(targets_BT)).to(world.device)
