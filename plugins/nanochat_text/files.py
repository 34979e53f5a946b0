"""Decompressing files once, hashing them, and places in them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from nanochat_core import (
    COMPRESSED,
    LONGEST_DOCUMENT,
    Damage,
    DataError,
    compression,
    decompressed,
    lock_file,
    open_atomic,
    open_regular,
    write_atomic,
)

FORMAT = 2  # of decompressed copies and indices
# Splits up to this many bytes on disk are hashed whole (a second or two), others by samples.
HASH_WHOLE = 2**30
SAMPLE, SAMPLES = 2**16, 64


def endings(*suffixes: str) -> tuple[str, ...]:
    """``suffixes``, each alone and followed by a suffix of compressed files."""
    return tuple(suffix + end for suffix in suffixes for end in ("", *COMPRESSED))


def identity(path: Path) -> str:
    """Digest of a file's path, size and modification time, 32 hexadecimal digits."""
    stat = path.stat()
    name = os.fsencode(path.resolve())
    return hashlib.sha256(name + f" {stat.st_size} {stat.st_mtime_ns} {FORMAT}".encode()).hexdigest()[:32]


@attrs.frozen
class Plain:
    """A file without compression, which can be read at any position.

    Args:
        path: the file, or its decompressed copy.
        problem: describes the part that could not be decompressed; empty when the file is complete.
    """

    path: Path
    problem: str = ""


def plain(path: Path, directory: Path, keep_damaged: bool) -> Plain:
    """Return a plain file unchanged; decompress other files into ``directory``, once for all processes and runs.

    Args:
        path: the file.
        directory: for decompressed copies.
        keep_damaged: keep the part before the damage, instead of raising.

    Raises:
        DataError: when it is damaged, or the disk is full.
    """
    with open_regular(path) as file:
        if not compression(file.read(16)) and not path.name.lower().endswith(COMPRESSED):
            return Plain(path)
    directory.mkdir(parents=True, exist_ok=True)
    base = directory / (identity(path) + ("-damaged" if keep_damaged else ""))
    done, report = base.with_suffix(".txt"), base.with_suffix(".json")
    with lock_file(base.with_suffix(".lock")):
        if not report.exists():  # written last
            problem = _decompress(path, done, keep_damaged)
            write_atomic(report, json.dumps({"file": str(path), "problem": problem}))
        return Plain(done, json.loads(report.read_text(encoding="utf-8"))["problem"])


def _decompress(path: Path, done: Path, keep_damaged: bool) -> str:
    """Decompress ``path`` to ``done``. Returns a description of the part that could not be read, or ""."""
    problem, line = "", 0  # bytes since the last line break
    try:
        with open_atomic(done) as target, open_regular(path) as source:
            try:
                for piece in decompressed(source, path.name):
                    target.write(piece)
                    line = line + len(piece) if b"\n" not in piece else len(piece) - piece.rindex(b"\n")
                    if line > LONGEST_DOCUMENT:
                        raise Damage(f"it has a line of more than {LONGEST_DOCUMENT:,} bytes")
            except Damage as error:
                problem = f"{path} can't be read ({error})"
                if not keep_damaged:
                    raise DataError(
                        f"{problem}; get the file again, or set data.on_error to skip", key="on_error"
                    ) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DataError(
                f"no room in {done.parent} to decompress {path}; make room, or set NANOCHAT_HOME to another disk",
                key="path",
            ) from error
        raise
    return problem


def fingerprint(paths: Sequence[Path], settings: Any) -> str:
    """Digest of settings and of each file's name, size and bytes; beyond 1 GiB in all, of 64 samples per file."""
    sizes = [path.stat().st_size for path in paths]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for path, size in zip(paths, sizes, strict=True):
        digest.update(b"\n" + os.fsencode(path.name) + f" {size} ".encode())
        with path.open("rb") as file:
            if sum(sizes) <= HASH_WHOLE:
                digest.update(hashlib.file_digest(file, "sha256").digest())
                continue
            for i in range(SAMPLES):
                file.seek(max(0, size - SAMPLE) * i // (SAMPLES - 1))
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def is_complete(path: Path, end: int, separator: str | None) -> bool:
    """Whether the document that ends at ``end`` of a damaged file was read as a whole: another line follows it, which
    for text must be a separator."""
    with path.open("rb") as file:
        file.seek(end)
        rest = file.read(len((separator or "").encode()) + 4)
    return b"\n" in (rest if separator is None else rest.removeprefix(b"\r").removeprefix(b"\n"))


COUNTED = 2**28  # bytes


def line_number(descriptor: int, position: int) -> int:
    """Number of the line at a position of a file, from 1 on; 0 when counting takes too long."""
    if position > COUNTED:
        return 0
    blocks = (os.pread(descriptor, min(2**20, position - start), start) for start in range(0, position, 2**20))
    return 1 + sum(block.count(b"\n") for block in blocks)
