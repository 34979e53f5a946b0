"""Files: names that become paths, reading what others made, atomic writes, hashes, locks, the ledger; the cache."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from nanochat_core.errors import ConfigError, Problem

if TYPE_CHECKING:
    from filelock import AcquireReturnProxy


def cache_dir() -> Path:
    """Return the directory of downloads and derived data: ``NANOCHAT_HOME`` or ``~/.cache/nanochat``; create it.

    Raises:
        ConfigError: when it can't be made or written, or there is no home directory.
    """
    given = os.environ.get("NANOCHAT_HOME")
    try:
        path = Path(given or "~/.cache/nanochat").expanduser().absolute()
        path.mkdir(parents=True, exist_ok=True)
        if os.access(path, os.W_OK | os.X_OK):
            return path
        reason = f"{shorten(str(path), 300)} can't be written"
    except OSError as error:
        reason = f"{shorten(str(error.filename or given), 300)} can't be made a directory ({error.strerror})"
    except RuntimeError:
        reason = f"{shorten(given or '~', 300)} begins with a home directory that is not known"
    begin = "names no usable directory" if given else "is not set"
    message = f"{begin}: {reason}; set it to a directory that you can write, for downloads and caches"
    raise ConfigError([Problem("", message, "the environment variable NANOCHAT_HOME")])


# Names in a run directory that packages below ``runs`` use; ``runs/directory.py`` has the others.
LEDGER = "metrics.jsonl"


def rank_log_name(rank: int) -> str:
    """Return the path of a rank's log, relative to the run directory."""
    return f"logs/rank_{rank:03d}.txt" if rank else "log.txt"


# ------------------------------------------------------------------------------ names and contents that others made

LONGEST_NAME = 200  # bytes; file systems allow 255, and temporary names are longer
LONGEST_PATH = 4000  # bytes; systems allow 4096, some 1024
JSON_LIMIT = 64 << 20  # bytes
LONGEST_LINE = 16 << 20  # bytes of a line of a ledger


def name_problem(name: object, *, nested: bool = False) -> str:
    """Return why ``name`` may not become the name of a file or directory; empty if it may.

    Every name from a network, a file, a command line or a plugin is checked here before it is used in a path.

    Args:
        nested: allow a relative path of several names with ``/`` between them.
    """
    if not isinstance(name, str):
        return f"must be text, not {type(name).__name__}"
    for part in name.split("/") if nested else [name]:
        if not part or part != part.strip():
            return "must not be empty, nor begin or end with a blank"
        if part.startswith((".", "-")):
            return "must not begin with a dot or a dash"
        if any(c in part for c in '/\\:"') or not part.isprintable():
            return "must not contain slashes, colons, quotes or control characters"
        try:
            length = len(part.encode())
        except UnicodeEncodeError:
            return "must be valid Unicode"
        if length > LONGEST_NAME:
            return f"must be at most {LONGEST_NAME} bytes long, not {length}"
    return ""


def path_in(directory: Path, name: object, *, nested: bool = False) -> Path:
    """Return the path of the file ``name`` in ``directory``; see ``name_problem``.

    Raises:
        ValueError: when the name would lead elsewhere, or can't be a name.
    """
    problem = name_problem(name, nested=nested)
    if problem:
        raise ValueError(f"the name {shorten(name)} {problem}")
    return directory / str(name)


def expand_path(path: str | Path) -> Path:
    """Return the absolute path that a user wrote, in which ``~`` stands for a home directory.

    Raises:
        ValueError: when no file can have such a path, or there is no such home directory.
    """
    text = os.fspath(path)
    try:
        if not text or "\0" in text:
            raise ValueError("must be a path, which is not empty and has no NUL characters")
        whole = Path(text).expanduser().absolute()
        if len(os.fsencode(whole)) > LONGEST_PATH or any(len(os.fsencode(part)) > 255 for part in whole.parts):
            raise ValueError(f"must be a path of at most {LONGEST_PATH} bytes, with names of at most 255")
        whole.as_posix().encode()
    except UnicodeEncodeError:
        raise ValueError("must be UTF-8, since an experiment file holds it: rename it, or make a link to it") from None
    except RuntimeError:
        raise ValueError(
            f"must be a whole path: {shorten(text)} begins with a home directory that is unknown"
        ) from None
    except OSError as error:
        raise ValueError(f"must be a whole path, because the current directory is gone: {error.strerror}") from None
    return whole


def shorten(value: object, most: int = 80) -> str:
    """Return ``value`` as Python writes it, without control characters, cut to ``most`` characters."""
    try:
        text = repr(value[: most + 1]) if isinstance(value, str | bytes) else repr(value)
    except Exception:  # a very large int, or an object whose __repr__ fails
        text = f"a {type(value).__name__}"
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def read_regular(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most ``limit`` bytes.

    Raises:
        OSError: when it can't be read, is larger, or is a directory, FIFO, device or socket (its ``strerror`` says so).
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
        if len(content) > limit:
            raise OSError(errno.EFBIG, f"it has more than the {limit:,} bytes that such a file may have", str(path))
        return content


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        OSError: when it can't be read, or is a directory, FIFO, device or socket (its ``strerror`` says so).
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO without a writer does not block
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def require_regular(path: Path) -> os.stat_result:
    """Return the status of a regular file, for a reader that opens it by name.

    Raises:
        OSError: when there is none, or it is a directory, FIFO, device or socket.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return status


def append_regular(path: Path) -> BinaryIO:
    """Open a file for appending, unbuffered; create it if it does not exist.

    Raises:
        OSError: when it can't be written, or is a directory, FIFO, device or socket.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)  # a FIFO without a reader does not block
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return os.fdopen(descriptor, "ab", buffering=0)


def read_json(path: Path, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """Return the object in a JSON file that somebody else may have written. See ``read_regular``.

    Raises:
        OSError: when the file can't be read.
        ValueError: when it is not a JSON object in UTF-8.
    """
    try:
        content = json.loads(read_regular(path, limit).decode())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"it must hold a JSON object, not a {type(content).__name__}")
    return content


def directory_problem(path: Path) -> str:
    """Return why files can't be written into the directory ``path``, which need not exist; empty if they can."""
    for there in (path, *path.parents):
        try:
            status = there.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            return f"{there} can't be used ({getattr(error, 'strerror', None) or error})"
        if not stat.S_ISDIR(status.st_mode):
            return f"{there} is not a directory"
        return "" if os.access(there, os.W_OK | os.X_OK) else f"{there} is not writable"
    return f"{path} can't be used"


# ---------------------------------------------------------------------------------------------------------- writing


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


def read_ledger(path: Path, damaged: list[int] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the records of a ledger. A last line that a crash cut short is skipped, and so is a line that is no record
    (see ``ledger_record``); a file that does not exist has no records.

    Args:
        damaged: gets the numbers, from 1, of the lines that are no records.

    Raises:
        OSError: when it can't be read, or is no regular file.
    """
    try:
        require_regular(path)
        with path.open("rb") as file:
            number = 0
            while line := file.readline(LONGEST_LINE):
                number += 1
                if not line.endswith(b"\n"):
                    while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                        pass
                    if not rest:
                        return
                    line = b""
                record = ledger_record(line)
                if record is not None:
                    yield record
                elif damaged is not None:
                    damaged.append(number)
    except FileNotFoundError:
        return


def ledger_record(line: bytes) -> dict[str, Any] | None:
    """Return the record in a line of a ledger: a flat JSON object with ``step`` and ``time``. None for anything else,
    such as the NULs that a power cut leaves on some file systems."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not all(isinstance(value, str | int | float) for value in record.values()):
        return None
    if any(isinstance(value, int) and abs(value) > 10**300 for value in record.values()):  # no float can hold it
        return None
    step, seconds = record.get("step"), record.get("time", 0.0)
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**63:
        return None
    if isinstance(seconds, str) or not isinstance(record.get("evaluator", ""), str):
        return None
    return record


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, as 64 hexadecimal digits."""
    require_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_few(texts: Sequence[str], most: int = 8, separator: str = ", ") -> str:
    """Join texts with commas. Those beyond the first ``most`` are only counted, as in ``a, b and 3 more``."""
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + more


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
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # there is none, or it can't be opened, and then not be locked either
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
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
