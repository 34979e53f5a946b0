"""The lock of a run directory, which knows where the directory is after somebody has moved it. Imports no torch."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
from pathlib import Path

from nanochat_core.errors import CheckpointError
from nanochat_core.files import read_regular, shorten

LOCK = "lock"
F_GETPATH = 50  # of macOS
LONGEST_PATH = 1024  # bytes that F_GETPATH writes at most


class RunLock:
    """The lock of a run directory, held until ``release``, the end of a ``with`` block or the end of the process.

    It holds the directory itself open, which is the same one after it was moved or another was put in its place.

    Raises:
        TimeoutError: when another process holds the lock.
        OSError: when there is no such directory, or it can't be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._lock = -1
        try:
            self._identity = os.fstat(self._directory)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            self._lock = os.open(LOCK, flags, 0o666, dir_fd=self._directory)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TimeoutError from None
            with contextlib.suppress(OSError):  # a full disk
                os.ftruncate(self._lock, 0)
                os.write(self._lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # other ranks, to which rank 0 sends its decisions, hold no lock

    def release(self) -> None:
        """Release the lock. Only the first call has an effect."""
        if self._lock >= 0:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # a child that was forked may have it open
        self._close()

    def _close(self) -> None:
        for descriptor in (self._lock, self._directory):
            if descriptor >= 0:
                os.close(descriptor)
        self._lock = self._directory = -1

    def where(self) -> Path | None:
        """Return where the directory is: under the path at which it was locked, or where it was moved to. None when it
        was deleted or can't be found. Takes microseconds."""
        try:
            if os.path.samestat(self.path.stat(), self._identity):
                return self.path
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError:
            return self.path  # a file system that does not answer; who writes next will be told
        with contextlib.suppress(OSError, ValueError):
            moved = _path_of(self._directory)
            if os.path.samestat(moved.stat(), self._identity):
                return moved
        return None

    def lost(self) -> str:
        """Return what has become of the directory, as a part of a sentence; empty while it is where it was locked."""
        where = self.where()
        if where == self.path:
            return ""
        if where is not None:
            return f"was moved to {where}"
        return "was replaced by another" if self.path.exists() else "was deleted"


def lock_run(path: Path) -> RunLock:
    """Lock a run that exists.

    Raises:
        CheckpointError: when another process trains the run, or the directory can't be written.
    """
    try:
        return RunLock(path)
    except TimeoutError:
        who = ""
        with contextlib.suppress(OSError):
            who = read_regular(path / LOCK, LONGEST_PATH).decode(errors="replace").strip()
            who = shorten(who)[1:-1]
        raise CheckpointError(
            f"{path}: another process is training this run{f' ({who})' if who else ''}; wait for it or stop it"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{path} can't be written ({error.strerror}): make it writable, or copy it to a writable "
            f"directory and name that with --runs-dir"
        ) from error


def _path_of(descriptor: int) -> Path:
    """Return the present path of an open directory.

    Raises:
        OSError: where the system does not tell.
    """
    if sys.platform == "darwin":
        path = fcntl.fcntl(descriptor, F_GETPATH, bytes(LONGEST_PATH)).rstrip(b"\0")
        return Path(os.fsdecode(path))
    return Path(f"/proc/self/fd/{descriptor}").readlink()
