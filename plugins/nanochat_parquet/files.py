"""Files on disk, in object stores and behind URLs: finding them and reading parts of them."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import attrs
import pyarrow as pa
import pyarrow.fs as pafs

from nanochat_core import DataError, Problem, find_files, refuse_shared, require_regular
from nanochat_parquet.retries import with_retries

Result = TypeVar("Result")

SAMPLE = 2**16
LONGEST_FOOTER = 2**28  # bytes; a thousand columns and a thousand row groups need less
ATTEMPTS = 5
TIMEOUT = 30.0  # seconds without any data from the server


class File(Protocol):
    """A file on disk, in an object store or behind a URL."""

    @property
    def name(self) -> str:
        """Path or URL, for messages."""

    @property
    def size(self) -> int:
        """Size in bytes."""

    def open(self) -> Any:
        """Open the file. Returns an object with read, seek, tell and close, for pyarrow to read from."""


@attrs.frozen
class LocalFile:
    """A file on this machine. Its name is its path."""

    name: str
    size: int

    def open(self) -> pa.NativeFile:
        require_regular(Path(self.name))
        return pa.OSFile(os.fsencode(self.name), mode="r")


@attrs.frozen
class StoredFile:
    """A file in a file system of pyarrow: S3, GCS, or a file system of fsspec."""

    name: str
    size: int
    path: str
    filesystem: pafs.FileSystem = attrs.field(eq=False, repr=False)

    def open(self) -> pa.NativeFile:
        return self.filesystem.open_input_file(self.path)


@attrs.frozen
class HttpFile:
    """A file behind an http or https URL, whose server answers range requests."""

    name: str
    size: int

    def open(self) -> HttpReader:
        return HttpReader(self)


class HttpReader(io.RawIOBase):
    """A stream that reads parts of a file behind a URL, each with one request. Requests that fail are repeated, which
    fsspec does not do.

    Raises:
        DataError: from reading, when the server does not send the data.
    """

    def __init__(self, file: HttpFile) -> None:
        super().__init__()
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._file.size)[whence]
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        start, end = self._position, self._file.size
        if size is not None and size >= 0:
            end = min(start + size, end)
        if end <= start:
            return b""
        data = _from_server(self._file.name, lambda: self._part(start, end))
        self._position = end
        return data

    def _part(self, start: int, end: int) -> bytes:
        from fsspec.asyn import sync

        http = _http()
        status, data = sync(http.loop, _get_part, http, self._file.name, start, end)
        if status == 200 and len(data) > end - start:
            raise DataError(
                f"the server of {self._file.name} does not support range requests; download the file instead",
                key="path",
            )
        if len(data) != end - start:
            raise OSError(f"{len(data)} bytes instead of {end - start}")
        return data


async def _get_part(http: Any, url: str, start: int, end: int) -> tuple[int, bytes]:
    """HTTP status, and the part of a file: at most one byte more than asked for, whatever the server sends."""
    session = await http.set_session()
    headers = {**http.kwargs["headers"], "Range": f"bytes={start}-{end - 1}"}
    async with session.get(http.encode_url(url), headers=headers) as response:
        http._raise_not_found_for_status(response, url)
        data = bytearray()
        async for block in response.content.iter_any():
            data += block[: end - start + 1 - len(data)]
            if len(data) > end - start:
                break
        return response.status, bytes(data)


def _http() -> Any:
    """The file system of fsspec for URLs. fsspec creates it once."""
    import aiohttp
    import fsspec

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
    client = {"timeout": timeout, "trust_env": True}  # proxies are named by environment variables
    return fsspec.filesystem("https", encoded=True, client_kwargs=client, headers={"Accept-Encoding": "identity"})


def _from_server(url: str, work: Callable[[], Result]) -> Result:
    return with_retries(
        f"{url} can't be read",
        work,
        _permanent_problem,
        attempts=ATTEMPTS,
        backoff=0.5,
        remedy="check the URL, or download the file",
        key="path",
    )


def _permanent_problem(error: BaseException) -> Problem | None:
    """Problem for an error of fsspec that another attempt won't remove; None for errors that may be temporary."""
    status = getattr(error, "status", None) or getattr(error.__cause__, "status", None)
    if isinstance(status, int):
        temporary = status in (408, 429) or status >= 500
        return None if temporary else Problem("path", f"its server answers {status}; check the URL")
    if isinstance(error, FileNotFoundError) and error.__cause__ is None:
        return Problem("path", "its server has no such file; check the URL")
    return None


def _http_file(url: str) -> HttpFile:
    size = _from_server(url, lambda: _http().info(url)["size"])
    if size is None:
        raise DataError(
            f"the server of {url} does not report the size of the file; download the file instead", key="path"
        )
    return HttpFile(url, int(size))


def find(places: str | Iterable[str], key: str) -> list[File]:
    """The parquet files at ``places``, those of each place sorted by name.

    Args:
        places: directories, files, patterns or URLs.
        key: option that names the places, for messages.

    Raises:
        DataError: when a place is missing or holds no parquet files.
    """
    files: list[File] = []
    local = []
    for place in [places] if isinstance(places, str) else places:
        scheme = urlsplit(place).scheme if "://" in place else ""
        if scheme and ("://***@" in place or "=***" in place):
            raise DataError(
                f"{place}: the credentials in this address are not kept in a run; give the whole address, as in "
                f"--set data.{key}=...",
                key=key,
            )
        if scheme in ("http", "https"):
            files.append(_http_file(place))
        elif scheme and scheme != "file":
            files += _find_remote(place, key)
        else:
            local.append(place.removeprefix("file://"))
            found = find_files(local[-1], [".parquet"], key, deep=False)
            files += [LocalFile(str(path), path.stat().st_size) for path in found]
    if len(local) > 1:
        find_files(local, [".parquet"], key, deep=False)  # the same file may be in two of them
    names = Counter(file.name for file in files)
    if names and names.most_common(1)[0][1] > 1:
        raise DataError(f"{names.most_common(1)[0][0]} is named twice; name it once", key=key)
    return files


def refuse_shared_shards(train: Iterable[File], val: Iterable[File], key: str) -> None:
    """Check that no shard is for training and for validation, as ``refuse_shared`` does.

    Raises:
        DataError: when one is.
    """
    local = [[Path(f.name) for f in files if isinstance(f, LocalFile)] for files in (train, val)]
    refuse_shared(local[0], local[1], key)
    for name in sorted({f.name for f in train} & {f.name for f in val}):
        raise DataError(f"{name} is among the training files too; remove it from one of the two", key=key)


def _find_remote(place: str, key: str) -> list[File]:
    """Files of an object store. Of a pattern, the directory before the first wildcard is listed and the names are
    matched. Options of the store follow a question mark, as in ``?endpoint_override=minio:9000&scheme=http``."""
    place, mark, options = place.partition("?")
    magic = glob.has_magic(place)
    base = place[: min(place.find(c) for c in "*[" if c in place)].rpartition("/")[0] if magic else place
    try:
        filesystem, path = _filesystem(base + mark + options)
        info = filesystem.get_file_info(path)
        if info.type == pafs.FileType.File:
            infos = [info]
        else:
            infos = filesystem.get_file_info(pafs.FileSelector(path, recursive=magic, allow_not_found=True))
    except (pa.ArrowException, OSError, ValueError, ImportError) as error:
        raise DataError(
            f"{place} can't be listed ({error}); check the address, your credentials, and that the library for "
            f"{urlsplit(place).scheme}:// is installed",
            key=key,
        ) from error
    pattern = path + place[len(base) :] if magic else "*.parquet" if len(infos) != 1 or infos[0].path != path else "*"
    infos = [i for i in infos if i.type == pafs.FileType.File and fnmatch.fnmatchcase(i.path, pattern)]
    if not infos:
        raise DataError(f"{place} holds no parquet files; set it to the place of your *.parquet shards", key=key)
    prefix = place.partition("://")[0] + "://"
    return [StoredFile(prefix + i.path, i.size, i.path, filesystem) for i in sorted(infos, key=lambda i: i.path)]


def _filesystem(url: str) -> tuple[pafs.FileSystem, str]:
    if urlsplit(url).scheme in ("s3", "gs", "gcs"):
        return pafs.FileSystem.from_uri(url)
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(url)
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def hash_file(file: File) -> bytes:
    """sha256 of a whole file, 32 bytes."""
    with file.open() as stream:
        digest = hashlib.sha256()
        while block := stream.read(2**22):
            digest.update(block)
    return digest.digest()


def hash_samples(file: File) -> bytes:
    """sha256 of a parquet file's footer and of 64 KiB at its start, in its middle and at its end, 32 bytes."""
    digest = hashlib.sha256()
    tail = read_tail(file)
    with file.open() as stream:
        for start in (0, file.size // 2, max(0, file.size - SAMPLE)):
            stream.seek(start)
            digest.update(stream.read(SAMPLE))
    digest.update(tail)
    return digest.digest()


def read_tail(file: File) -> bytes:
    """The end of a parquet file: its footer and the eight bytes after it."""
    with file.open() as stream:

        def part(start: int) -> bytes:
            stream.seek(start)
            data: bytes = stream.read(file.size - start)
            return data

        return footer_bytes(part, file.size)


def footer_bytes(part: Callable[[int], bytes], size: int) -> bytes:
    """Footer of a parquet file and the eight bytes after it.

    Args:
        part: reads the file from a position to its end.
        size: of the file, in bytes.
    """
    tail = part(max(0, size - SAMPLE))
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if len(tail) < length <= min(size, LONGEST_FOOTER):
        tail = part(size - length)
    return tail[-length:]
