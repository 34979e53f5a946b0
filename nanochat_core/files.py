"""Directories outside a run, and what every room does with files: locks, whole writes, removal."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filelock import AcquireReturnProxy


def cache_dir() -> Path:
    """Where downloads and derived data are kept: ``NANOCHAT_HOME``, else ``~/.cache/nanochat``; created if absent."""
    path = Path(os.environ.get("NANOCHAT_HOME") or Path.home() / ".cache" / "nanochat").expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


def rank_log_name(rank: int) -> str:
    """Where in a run directory a rank's log is."""
    return f"logs/rank_{rank:03d}.txt" if rank else "log.txt"


def write_atomic(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old or the new one, never half of it, after a power cut too."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def lock_file(path: Path, timeout: float = -1.0) -> AcquireReturnProxy:
    """Lock ``path`` and write into it who holds it, as in ``process 123 on host``. The file stays when the lock goes.

    The lock is released at the end of ``with lock_file(path):``, by ``.lock.release()`` of what is returned, or when
    this process ends, however it ends. The directory is made if it is absent.

    Args:
        timeout: seconds to wait for another process; 0: not at all, -1: as long as it takes.

    Raises:
        TimeoutError: another process holds it.
        OSError: the file can't be written, or its disk has no locks.
    """
    from filelock import FileLock  # takes some time to import, which commands that lock nothing need not spend

    def sign(descriptor: int) -> None:
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    # The soft locks that filelock falls back to would outlive a process that is killed.
    return FileLock(path, fallback_to_soft=False, on_acquired=sign).acquire(timeout)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock at ``path``; see ``lock_file``.

    It asks with a shared lock, which filelock does not have: two processes that ask at the same time don't take each
    other for the holder, and a directory that is read-only can be asked about.
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
