"""Tokens and rows of a set of texts other than the run's own data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from nanochat_bpb.config import TextSet
from nanochat_core import (
    COMPRESSED,
    IGNORED,
    Batch,
    DataError,
    EvaluatorContext,
    Tokens,
    field_text,
    find_files,
    read_json_lines,
    read_string_column,
    read_text,
)

FIELD = "text"  # of JSON lines and of Parquet files
DOCUMENTS_PER_BATCH = 64  # documents tokenized together


def documents(path: Path) -> Iterator[str]:
    """Texts of a set, in the order of their files.

    Raises:
        DataError: when a file can't be read, naming it.
    """
    for file in find_files(str(path), endings(".txt"), "sets"):
        name = file.name.lower()
        try:
            if name.endswith(endings(".jsonl", ".ndjson")):
                for number, value in read_json_lines(file):
                    try:
                        yield field_text(value, FIELD)
                    except ValueError as error:
                        raise ValueError(f"line {number}: {error}") from error
            elif name.endswith(".parquet"):
                yield from read_string_column(file, FIELD)
            else:
                yield read_text(file)
        except (OSError, ValueError) as error:
            raise DataError(f"{file} can't be read ({error}): correct or remove it", key="sets") from error


def endings(*suffixes: str) -> tuple[str, ...]:
    """``suffixes``, each alone and followed by a suffix of compressed files."""
    return tuple(suffix + end for suffix in suffixes for end in ("", *COMPRESSED))


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
