"""Files: whole or not at all, on the disk, hashed, locked; and directories outside a run."""

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
