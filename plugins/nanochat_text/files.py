"""Finding files, decompressing them once, and hashing them."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import attrs
import pyarrow as pa

from nanochat_core import DataError, lock_file, open_atomic, write_atomic

COMPRESSED = (".gz", ".zst")
BLOCK = 2**22
# Splits up to this many bytes on disk are hashed whole (a second or two), others by samples.
HASH_WHOLE = 2**30
SAMPLE, SAMPLES = 2**16, 64


def find(places: str | Iterable[str], suffixes: Sequence[str], key: str) -> list[Path]:
    """The files at ``places``, those of each place sorted by name.

    Args:
        places: directories, files or patterns.
        suffixes: of the files to use in a directory, such as ``.jsonl``; followed by ``.gz`` or ``.zst`` too.
        key: option that names the places, for messages.

    Raises:
        DataError: when a place is missing or holds no such files.
    """
    files: list[Path] = []
    endings = tuple(suffix + end for suffix in suffixes for end in ("", *COMPRESSED))
    for place in [places] if isinstance(places, str) else places:
        path = Path(place).expanduser().absolute()
        if path.is_dir():
            here = sorted(p for p in path.rglob("*") if p.name.endswith(endings) and p.is_file())
        elif path.is_file():
            here = [path]
        else:
            here = sorted(p for p in Path(path.anchor).glob(str(path.relative_to(path.anchor))) if p.is_file())
        if not here:
            what = f"holds no {', '.join('*' + s for s in suffixes)}" if path.is_dir() else "does not exist"
            raise DataError(f"{path} {what}; set it to a file, a directory, or a pattern that matches files", key=key)
        files += here
    return files


def open_compressed(path: Path) -> pa.NativeFile:
    """A stream of the decompressed bytes."""
    return pa.input_stream(str(path), compression="gzip" if path.suffix == ".gz" else "zstd")


def is_damage(error: Exception) -> bool:
    """Whether an error of a decompressor is about the file's content. (Errors of the system have a number.)"""
    return isinstance(error, pa.ArrowException) or (isinstance(error, OSError) and error.errno is None)


def identity(path: Path) -> str:
    """Digest of a file's path, size and modification time, 32 hexadecimal digits."""
    stat = path.stat()
    return hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:32]


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
    if path.suffix not in COMPRESSED:
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
    problem = ""
    try:
        with open_atomic(done) as target, open_compressed(path) as source:
            try:
                while block := source.read(BLOCK):
                    target.write(block)
            except Exception as error:
                if not is_damage(error):
                    raise
                problem = f"{path} can't be decompressed after its first {target.tell():,} bytes ({error})"
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
        digest.update(f"\n{path.name} {size} ".encode())
        with path.open("rb") as file:
            if sum(sizes) <= HASH_WHOLE:
                digest.update(hashlib.file_digest(file, "sha256").digest())
                continue
            for i in range(SAMPLES):
                file.seek(max(0, size - SAMPLE) * i // (SAMPLES - 1))
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()
