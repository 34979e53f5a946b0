"""Bytes of files, decompressed piece by piece, up to the place that is damaged.

A file is compressed if it begins as one, whatever its name is: gzip, bzip2, xz and Zstandard. Imports no torch.
"""

from __future__ import annotations

import bz2
import contextlib
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Protocol, cast

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # suffixes of what can be read
PIECE = 2**20  # bytes that are yielded at a time, at most
READ = 2**16  # bytes of a compressed file that are read at a time, by pyarrow too
LZMA_MEMORY = 2**29  # bytes; xz -9 needs 2**26

# More than this many bytes that are so much larger than the file are no text. (gzip can't exceed 1,032.)
LARGE, LARGEST_RATIO = 2**30, 500

MAGIC = {"gzip": b"\x1f\x8b", "bzip2": b"BZh", "xz": b"\xfd7zXZ\0", "zstd": b"\x28\xb5\x2f\xfd"}
NAMES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
BOM = b"\xef\xbb\xbf"


class Damage(ValueError):
    """Content that can't be read from some place on: what precedes the place was yielded."""


def compression(head: bytes) -> str:
    """Return how a file that begins with ``head`` is compressed, a key of ``MAGIC``; empty if it is not."""
    name = next((name for name, magic in MAGIC.items() if head.startswith(magic)), "")
    if name == "bzip2" and head[4:10] not in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90"):  # "BZh" may begin a text
        return ""
    return name


def decompressed(file: BinaryIO, name: str = "") -> Iterator[bytes]:
    """Yield the content of a file in pieces of at most a MiB, decompressed if it is compressed.

    Files that were compressed one by one and concatenated are read to the end, as are zeros behind the end. A
    byte-order mark of UTF-8 at the start, or at the start of a concatenated file, is left out.

    Args:
        file: opened for reading, at its start; it must be able to seek.
        name: of the file; one with a suffix in ``COMPRESSED`` must be compressed.

    Raises:
        Damage: after everything before the damage was yielded.
        OSError: when the file can't be read.
    """
    head = file.read(16)
    kind = compression(head)
    file.seek(0)
    if not kind:
        expected = next((kind for suffix, kind in NAMES.items() if name.lower().endswith(suffix)), "")
        if expected and head:
            raise Damage(f"it is not compressed with {expected}: if it is not compressed, take the suffix off its name")
        if expected:
            raise Damage("it is empty")
        yield from _without_mark(iter(lambda: file.read(PIECE), b""))
        return
    done = 0
    try:
        for piece in _pieces(file, kind, lambda: PIECE):
            done += len(piece)
            yield piece
            if done > LARGE and done > LARGEST_RATIO * max(file.tell(), 1):
                raise Damage(f"it grows to more than {LARGEST_RATIO} times its size, as no text does")
    except _ERRORS as error:
        for piece in _up_to_damage(file, kind, done):
            done += len(piece)
            yield piece
        raise Damage(f"it can't be decompressed after its first {done:,} bytes ({error})") from error


def _without_mark(pieces: Iterator[bytes]) -> Iterator[bytes]:
    first = b""
    try:
        while len(first) < len(BOM) and (more := next(pieces, b"")):
            first += more
    finally:
        if rest := first.removeprefix(BOM):
            yield rest
    yield from pieces


class _Broken(Exception):
    """An error of a decompressor that raises what the system may raise too."""


_ERRORS = (zlib.error, lzma.LZMAError, EOFError, _Broken)


class _Decompressor(Protocol):
    """What ``bz2`` and ``lzma`` have."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    """``zlib``'s, with their methods."""

    def __init__(self) -> None:
        self._inner, self._rest = zlib.decompressobj(wbits=31), b""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        done = self._inner.decompress(self._rest + data, max_length)
        self._rest = self._inner.unconsumed_tail
        return done

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def needs_input(self) -> bool:
        return not self._rest

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data


class _Bzip2:
    """``bz2``'s, whose errors are OSErrors without a number."""

    def __init__(self) -> None:
        self._inner = bz2.BZ2Decompressor()

    def decompress(self, data: bytes, max_length: int) -> bytes:
        try:
            return self._inner.decompress(data, max_length)
        except OSError as error:
            raise _Broken(str(error)) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _xz() -> _Decompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=LZMA_MEMORY)


MEMBERS: dict[str, Callable[[], _Decompressor]] = {"gzip": _Gzip, "bzip2": _Bzip2, "xz": _xz}


def _pieces(file: BinaryIO, kind: str, most: Callable[[], int]) -> Iterator[bytes]:
    """The content of a compressed file, in pieces of at most ``most()`` bytes."""
    if kind == "zstd":
        yield from _without_mark(_zstd(file, most))
        return
    pending = b""
    while True:
        member = MEMBERS[kind]()
        yield from _without_mark(_member(file, member, pending, most))
        pending = member.unused_data.lstrip(b"\0")
        while not pending and (data := file.read(READ)):
            pending = data.lstrip(b"\0")
        if not pending:
            return
        pending += file.read(16)
        if compression(pending) != kind:
            raise _Broken("what follows its end is not compressed")


def _member(file: BinaryIO, member: _Decompressor, data: bytes, most: Callable[[], int]) -> Iterator[bytes]:
    """The content of one of the files that were concatenated; it begins with ``data``."""
    while not member.eof:
        if not data and member.needs_input:
            data = file.read(READ)
            if not data:
                raise EOFError("it breaks off")
        done = member.decompress(data, most())
        data = b""
        if done:
            yield done


def _zstd(file: BinaryIO, most: Callable[[], int]) -> Iterator[bytes]:
    import pyarrow as pa

    try:
        kept_open = _Slow(file, 1 << 62)  # pyarrow closes what it reads from
        with pa.CompressedInputStream(pa.PythonFile(kept_open, mode="r"), "zstd") as stream:
            while piece := stream.read(most()):
                yield piece
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise _Broken(str(error)) from error


class _Slow(io.RawIOBase):
    """A file that gives ``step`` bytes at a time from a position on."""

    def __init__(self, file: BinaryIO, position: int, step: int = 1) -> None:
        super().__init__()
        self._file, self._position, self._step = file, position, step

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        left = self._position - self._file.tell()
        return self._file.read(min(size, left) if left > 0 else self._step)


def _up_to_damage(file: BinaryIO, kind: str, skip: int) -> Iterator[bytes]:
    """What precedes the damage, but its first ``skip`` bytes.

    A decompressor that raises keeps what it made in the same call. So the file is read again, in the smallest steps
    where the damage is.
    """
    slow = cast(BinaryIO, _Slow(file, file.tell() - 2 * READ, 64 if kind == "zstd" else 1))
    file.seek(0)
    done, small, most = 0, bytearray(), [PIECE if skip else 1]
    with contextlib.suppress(*_ERRORS):
        for piece in _pieces(slow, kind, lambda: most[0]):
            if done >= skip:
                small += piece
            done += len(piece)
            if done >= skip:
                most[0] = 1
    if small:
        yield bytes(small)
