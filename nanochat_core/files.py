"""Files: whole or not at all, on the disk, hashed; and directories outside a run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO


def cache_dir() -> Path:
    """Where downloads and derived data are kept: ``NANOCHAT_HOME``, else ``~/.cache/nanochat``; created if absent."""
    path = Path(os.environ.get("NANOCHAT_HOME") or Path.home() / ".cache" / "nanochat").expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


# Names in a run directory that rooms below ``runs`` need; ``runs/directory.py`` has the others.
LEDGER = "metrics.jsonl"


def rank_log_name(rank: int) -> str:
    """Where in a run directory a rank's log is."""
    return f"logs/rank_{rank:03d}.txt" if rank else "log.txt"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a small file with ``open_atomic``; a text as UTF-8."""
    with open_atomic(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write that replaces ``path`` when the block ends: a reader sees the old content or the new,
    never half of it, after a power cut too. When the block raises, ``path`` stays as it is.

    Several processes and threads may write the same path at once. A killed one leaves ``.<name>.<something>`` behind.

    Raises:
        OSError: when it can't be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def read_ledger(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a ledger, a flat JSON object per line; a last line that a crash cut short is left out, and a file that
    does not exist has none."""
    try:
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield json.loads(line)
    except FileNotFoundError:
        return


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_few(texts: Sequence[str], most: int = 8) -> str:
    """The texts with commas between them, those beyond ``most`` only counted: ``a, b and 3 more``."""
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def remove(path: Path) -> None:
    """Delete a file or a directory, as far as that is possible."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Until a file's content, or a directory's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
