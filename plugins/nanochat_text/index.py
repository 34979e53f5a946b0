"""The index of a file: start and end of each document, in an array on disk that is mapped into memory."""

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
SPACES = [9, 13, 32, 0xEF, 0xBB, 0xBF]  # white space of JSON, and the bytes of a byte-order mark


def line_spans(path: Path) -> Iterator[Spans]:
    """Spans of all lines, without their line breaks (LF or CRLF), in blocks of bounded size unless a line is larger."""
    position = line_start = 0  # of the block; of the line that continues from earlier blocks
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
    """Spans of the lines that are not empty, nor of nothing but white space: each is a document."""
    with path.open("rb") as file:
        content = np.memmap(file, dtype=np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
        for spans in line_spans(path):
            spans = spans[spans[:, 1] > spans[:, 0]]
            candidates = np.flatnonzero(np.isin(content[spans[:, 0]], SPACES))
            blank = [i for i in candidates.tolist() if _is_blank(file.fileno(), *spans[i].tolist())]
            yield np.delete(spans, blank, axis=0)


def _is_blank(descriptor: int, start: int, end: int) -> bool:
    blocks = (os.pread(descriptor, min(BLOCK, end - at), at) for at in range(start, end, BLOCK))
    return not any(block.strip(bytes(SPACES)) for block in blocks)


def text_spans(path: Path, separator: str) -> Iterator[Spans]:
    """Spans of the documents between lines that equal ``separator``, without empty documents."""
    separator_bytes = separator.encode()
    start = end = -1  # of the current document: start of its first line, end of its last line
    with path.open("rb") as file:
        for spans in line_spans(path):
            candidates = np.flatnonzero(spans[:, 1] - spans[:, 0] == len(separator_bytes))
            cuts = [
                i
                for i in candidates.tolist()
                if os.pread(file.fileno(), len(separator_bytes), spans[i, 0]) == separator_bytes
            ]
            documents = []
            first = 0
            for cut in [*cuts, len(spans)]:
                if cut > first:  # lines of a document
                    start = int(spans[first, 0]) if start < 0 else start
                    end = int(spans[cut - 1, 1])
                if cut < len(spans) and start >= 0:
                    documents.append((start, end))
                    start = -1
                first = cut + 1
            yield np.array(documents, dtype=np.int64).reshape(-1, 2)
    if start >= 0:
        yield np.array([[start, end]], dtype=np.int64)


def load_index(path: Path, directory: Path, separator: str | None = None) -> Spans:
    """Spans of the documents of a plain file, int64 [documents, 2], computed once and kept in ``directory``.

    Args:
        path: the file.
        directory: for indices.
        separator: line between text documents; None for JSON lines.
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
