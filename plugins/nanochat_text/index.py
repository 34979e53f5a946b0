"""Where the documents of a file begin and end: an array on disk that is mapped, not read, into memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from nanochat_core import lock_file, open_atomic
from nanochat_text.files import identity

Spans: TypeAlias = npt.NDArray[np.int64]  # [documents, 2]: first byte of each, and the byte after it
BLOCK = 2**24
NEWLINE, RETURN = 10, 13


def line_spans(path: Path) -> Iterator[Spans]:
    """Spans of all lines, without their line breaks (LF or CRLF), in blocks of bounded size unless a line is larger."""
    position = line_start = 0  # of the block; of the line that goes on from earlier blocks
    last = -1  # byte before the block
    with path.open("rb") as file:
        while data := file.read(BLOCK):
            block = np.frombuffer(data, dtype=np.uint8)
            breaks = np.flatnonzero(block == NEWLINE)
            starts = (
                np.concatenate(([line_start], position + breaks[:-1] + 1)) if len(breaks) else np.empty(0, np.int64)
            )
            ends = position + breaks
            before = np.where(breaks > 0, block[breaks - 1], last if last >= 0 else 0)
            ends = ends - ((before == RETURN) & (ends > starts))
            yield np.stack([starts, ends], axis=1).astype(np.int64)
            if len(breaks):
                line_start = position + int(breaks[-1]) + 1
            position += len(data)
            last = data[-1]
    if position > line_start:
        yield np.array([[line_start, position]], dtype=np.int64)


def jsonl_spans(path: Path) -> Iterator[Spans]:
    """One document a line that isn't empty."""
    for spans in line_spans(path):
        yield spans[spans[:, 1] > spans[:, 0]]


def text_spans(path: Path, separator: str) -> Iterator[Spans]:
    """Documents between the lines that equal ``separator``; empty ones don't count."""
    wanted = separator.encode()
    start = end = -1  # of the document so far: from its first line to the end of its last
    with path.open("rb") as file:
        for spans in line_spans(path):
            candidates = np.flatnonzero(spans[:, 1] - spans[:, 0] == len(wanted))
            cuts = [i for i in candidates.tolist() if os.pread(file.fileno(), len(wanted), spans[i, 0]) == wanted]
            found = []
            first = 0
            for cut in [*cuts, len(spans)]:
                if cut > first:  # lines of a document
                    start = int(spans[first, 0]) if start < 0 else start
                    end = int(spans[cut - 1, 1])
                if cut < len(spans) and start >= 0:
                    found.append((start, end))
                    start = -1
                first = cut + 1
            yield np.array(found, dtype=np.int64).reshape(-1, 2)
    if start >= 0:
        yield np.array([[start, end]], dtype=np.int64)


def load_index(path: Path, directory: Path, separator: str | None = None) -> Spans:
    """The spans of a plain file's documents, made once and kept in ``directory``.

    Args:
        separator: of text documents; None for JSON lines.
    """
    directory.mkdir(parents=True, exist_ok=True)
    kind = "jsonl" if separator is None else f"text-{separator.encode().hex()[:64]}"
    kept = directory / f"{identity(path)}-{kind}.spans"
    with lock_file(kept.with_suffix(".lock")):
        if not kept.exists():
            with open_atomic(kept) as file:
                for spans in jsonl_spans(path) if separator is None else text_spans(path, separator):
                    spans.tofile(file)
    if kept.stat().st_size == 0:  # nothing to map
        return np.empty((0, 2), dtype=np.int64)
    return np.memmap(kept, dtype=np.int64, mode="r").reshape(-1, 2)
