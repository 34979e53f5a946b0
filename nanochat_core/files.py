"""Files: atomic writes, hashes, locks, the ledger; and the cache directory."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from filelock import AcquireReturnProxy


def cache_dir() -> Path:
    """Return the directory of downloads and derived data: ``NANOCHAT_HOME`` or ``~/.cache/nanochat``; create it."""
    path = Path(os.environ.get("NANOCHAT_HOME") or Path.home() / ".cache" / "nanochat").expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


# Names in a run directory that packages below ``runs`` use; ``runs/directory.py`` has the others.
LEDGER = "metrics.jsonl"


def rank_log_name(rank: int) -> str:
    """Return the path of a rank's log, relative to the run directory."""
    return f"logs/rank_{rank:03d}.txt" if rank else "log.txt"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a small file atomically with ``open_atomic``. Text is encoded as UTF-8."""
    with open_atomic(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file for writing that replaces ``path`` when the ``with`` block ends.

    A reader sees the old or the new content, never a part of it, even after a power failure. When the block raises,
    ``path`` is unchanged. Several processes and threads may write the same path at the same time. A process that is
    killed leaves a file ``.<name>.<pid>.<random>`` behind.

    Raises:
        OSError: when the file can't be written.
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
    """Yield the records of a ledger, a flat JSON object per line. A last line that a crash cut short is skipped; a file
    that does not exist has no records."""
    try:
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield json.loads(line)
    except FileNotFoundError:
        return


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_few(texts: Sequence[str], most: int = 8) -> str:
    """Join texts with commas. Those beyond the first ``most`` are only counted, as in ``a, b and 3 more``."""
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def lock_file(path: Path, timeout: float = -1.0) -> AcquireReturnProxy:
    """Lock ``path`` and write its holder into it, as in ``process 123 on host``. The file stays after the release.

    The lock is released at the end of ``with lock_file(path):``, by ``.lock.release()`` of the returned object, or when
    this process ends in any way. The directory is created if it does not exist.

    Args:
        timeout: seconds to wait for another process that holds the lock; 0: do not wait, -1: wait without limit.

    Raises:
        TimeoutError: when another process holds the lock.
        OSError: when the file can't be written, or its file system does not support locks.
    """
    from filelock import FileLock  # imported here, since the import is slow and most commands lock nothing

    def sign(descriptor: int) -> None:
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    # The soft locks to which filelock falls back would outlive a process that is killed.
    return FileLock(path, fallback_to_soft=False, on_acquired=sign).acquire(timeout)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock that ``lock_file`` sets at ``path``.

    The test is an attempt at a shared lock, which filelock does not have: two processes that test at the same time
    don't take each other for the holder, and the directory may be read-only.
    """
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def remove(path: Path) -> None:
    """Delete a file, or as much of a directory as possible. A path that does not exist is no error."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's list of names, is on the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
