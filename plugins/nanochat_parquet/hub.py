"""Files of a data set on the Hugging Face hub: finding them on this machine, downloading and checking them.

Credentials, mirrors (``HF_ENDPOINT``) and offline mode are those of ``huggingface_hub``. Files in its cache are used,
and nothing is written there: files that are fetched here are kept under ``NANOCHAT_HOME``, named by their content.
``Hub.fetch`` explains why ``hf_hub_download`` is not used.
"""

from __future__ import annotations

import hashlib
import platform
import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
from huggingface_hub import hf_hub_url, try_to_load_from_cache

from nanochat_core import DataError, file_sha256, first_few, lock_file, write_atomic
from nanochat_parquet.documents import Footer, parse_footer
from nanochat_parquet.files import footer_bytes
from nanochat_parquet.hub_errors import with_hub_retries
from nanochat_parquet.hub_listing import HubFile, Listing
from nanochat_parquet.hub_requests import request

ABANDONED_SECONDS = 3600.0  # a partial download that has not grown for so long belongs to no process


class Hub:
    """The files of one data set at one revision: those on this machine, and the others by download.

    Args:
        repo: owner and name of the data set.
        revision: branch, tag or commit.
        directory: where files, footers, locks and the last answers of the hub are kept.
        endpoint: address of the hub; None: the one that the environment names.
        hub_cache: cache of ``huggingface_hub``; None: the one that the environment names.
        backoff: seconds before the second attempt; doubles with each further attempt.
    """

    def __init__(
        self,
        repo: str,
        revision: str,
        directory: Path,
        *,
        endpoint: str | None = None,
        hub_cache: Path | None = None,
        backoff: float = 1.0,
    ) -> None:
        self.repo, self.revision = repo, revision
        self._directory = directory
        self._endpoint, self._hub_cache, self._backoff = endpoint, hub_cache, backoff
        self._listing = Listing(repo, revision, directory, endpoint, backoff)

    @property
    def offline(self) -> DataError | None:
        """The error when the hub does not answer, so that only files on this machine can be used; otherwise None."""
        return self._listing.offline

    def names(self, pattern: str) -> list[str]:
        """Sorted names of the data set's files that match a pattern.

        Raises:
            DataError: when there are none.
        """
        return self._listing.names(pattern)

    # -- files on this machine

    def files(self, names: Sequence[str]) -> list[HubFile]:
        """Files by name, with their sizes and checksums.

        Raises:
            DataError: when some don't exist; when the hub does not answer, if some are not on this machine.
        """
        if self.offline is None:
            return self._listing.files(names)
        files = {name: self._local_file(name) for name in names}
        missing = [name for name, file in files.items() if file is None]
        if missing:
            raise DataError(
                f"{first_few(missing, 3)} of {self.repo} ({len(missing)} of {len(names)} files) are not on this "
                f"machine, and the hub is not available ({self.offline}); lower data.shards to the files that are "
                f"here, or run `nanochat data download` with a network (and HF_HUB_OFFLINE unset)",
                key="shards",
            )
        return [file for file in files.values() if file is not None]

    def _local_file(self, name: str) -> HubFile | None:
        """A file on this machine, described by the last answer of the hub or by the hub's cache; None if absent."""
        recorded = self._listing.recorded(name)
        if recorded is not None and self.local(recorded) is not None:
            return recorded
        path = self._cached(name)
        return None if path is None else HubFile(name, _etag(path), path.stat().st_size)

    def _cached(self, name: str) -> Path | None:
        """Path of a file in the hub's own cache."""
        # A cache that another program filled has its own record of the commit behind a branch.
        for revision in (self._listing.commit, self.revision):
            if revision is not None:
                path = try_to_load_from_cache(
                    self.repo, name, repo_type="dataset", revision=revision, cache_dir=self._hub_cache
                )
                if isinstance(path, str):
                    return Path(path)
        return None

    def local(self, file: HubFile) -> Path | None:
        """Path of a file on this machine; None when it is absent or incomplete."""
        own = self._path(file)
        if own.is_file() and own.stat().st_size == file.size:
            return own
        path = self._cached(file.name)
        if path is None or path.stat().st_size != file.size:
            return None
        return path if not path.is_symlink() or _etag(path) == file.etag else None

    # -- footers

    def footer(self, file: HubFile, column: str) -> Footer:
        """The footer of a file, fetched from the hub (some KB) when neither the footer nor the file is on this machine.

        Args:
            column: name of the column of texts, which must exist.

        Raises:
            DataError: when the column is missing, or the hub doesn't answer.
        """
        kept = self._footer_path(file)
        try:
            return self._parse_footer(file, kept.read_bytes(), column)
        except (OSError, NotParquet):  # absent or damaged
            pass
        path = self.local(file)
        tail = _tail(path) if path is not None else footer_bytes(lambda start: self._range(file, start), file.size)
        footer = self._parse_footer(file, tail, column)
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, tail)
        return footer

    def _footer_path(self, file: HubFile) -> Path:
        # Not shared between data sets: nothing shows whether a footer belongs to the file before the file is here.
        return self._directory / "footers" / self._files.name / file.etag

    def _parse_footer(self, file: HubFile, tail: bytes, column: str) -> Footer:
        name = f"{file.name} of {self.repo}"
        try:
            return parse_footer(name, tail, column)
        except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
            raise NotParquet(f"{name} is not a parquet file ({error})") from error

    def _range(self, file: HubFile, start: int) -> bytes:
        """Bytes of a file from ``start`` to its end, from the hub."""

        def get() -> bytes:
            with self._request(file, f"bytes={start}-{file.size - 1}") as response:
                skipped, data = start if response.status_code == 206 else 0, bytearray()
                for block in response.iter_raw():  # of a server without range requests, the whole file
                    data += block[max(start - skipped, 0) :]
                    skipped += min(len(block), max(start - skipped, 0))
                    if len(data) >= file.size - start:
                        break
            if len(data) < file.size - start:
                raise OSError(f"{len(data)} bytes instead of {file.size - start}")
            return bytes(data[: file.size - start])

        return with_hub_retries(f"the footer of {file.name}", get, self._backoff)

    def _request(self, file: HubFile, part: str) -> AbstractContextManager[Any]:
        """The response of the hub to a request for a range of a file, before its content is read."""
        url = hf_hub_url(
            self.repo, file.name, repo_type="dataset", revision=self._listing.commit, endpoint=self._endpoint
        )
        return request("GET", url, headers={"Range": part})

    # -- whole files

    @cached_property
    def _files(self) -> Path:
        return self._directory / "files" / self.repo.replace("/", "--")

    def _path(self, file: HubFile) -> Path:
        return self._files / file.etag

    def _partial(self, file: HubFile) -> Path:
        """The partial download of a file. Each machine has its own: not all shared disks lock between machines."""
        return self._files / f"{file.etag}.{platform.node()}.part"

    def check_disk_space(self, files: Sequence[HubFile]) -> None:
        """Check that the disk has room for files, after removing abandoned partial downloads of other files.

        Raises:
            DataError: when it has not, with the space that is free and needed.
        """
        parts = {self._partial(file) for file in files}
        for left in self._files.glob("*.part"):
            with suppress(OSError):
                if left not in parts and time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                    left.unlink()
        existing = next(path for path in self._files.absolute().parents if path.exists())
        free, needed = shutil.disk_usage(existing).free, sum(file.size for file in files)
        needed -= sum(part.stat().st_size for part in parts if part.exists())
        if needed > free:
            raise DataError(
                f"{len(files)} files of {self.repo} need {needed / 1e9:.1f} GB, {existing} has {free / 1e9:.1f} "
                f"GB free; lower data.shards, make room, or set NANOCHAT_HOME to another disk",
                key="shards",
            )

    def fetch(self, file: HubFile, column: str, progress: Callable[[int], None] = lambda _: None) -> Path:
        """Download a file and check it, unless it is on this machine. Other processes that need it wait meanwhile.

        A download that was killed continues where it stopped. ``hf_hub_download`` can't do that: each call writes to a
        file with a random name. With huggingface_hub 2.4, with and without ``HF_HUB_DISABLE_XET``, a process that was
        killed after 10 of 45 MB left these behind for ever, and the next one asked for all 45 MB.

        Args:
            column: name of the column of texts, which must exist.
            progress: called with numbers of bytes as they arrive; negative when some have to be fetched again.

        Returns:
            Path of the complete file.

        Raises:
            DataError: when it can't be downloaded, or is not usable.
        """
        reported = 0

        def report(received: int) -> None:
            nonlocal reported
            progress(received - reported)
            reported = received

        part = self._partial(file)

        def get() -> Path:
            self._receive(file, part, report)
            try:
                self._check(part, file, column)
            except OSError:
                part.unlink()
                raise
            return part.replace(self._path(file))

        with lock_file(self._directory / "locks" / f"{file.etag}.lock"):
            path = self.local(file) or with_hub_retries(f"{file.name} of {self.repo}", get, self._backoff)
        report(file.size)
        return path

    def _receive(self, file: HubFile, part: Path, report: Callable[[int], None]) -> None:
        """Append the missing bytes of a file to ``part``, with a new request if one broke after some bytes."""
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as stream:
            while stream.tell() < file.size:
                before = stream.tell()
                try:
                    self._receive_some(file, stream, report)
                except Exception:
                    if stream.tell() <= before:
                        raise

    def _receive_some(self, file: HubFile, stream: BinaryIO, report: Callable[[int], None]) -> None:
        """Request all missing bytes of a file, once."""
        with self._request(file, f"bytes={stream.tell()}-") as response:
            if response.status_code != 206:  # a server without range requests sends the whole file
                stream.seek(0)
                stream.truncate()
            report(stream.tell())
            for block in response.iter_raw():
                stream.write(block[: file.size - stream.tell()])
                report(stream.tell())
                if stream.tell() >= file.size:  # what follows is not the file's
                    break
            stream.flush()

    def _check(self, path: Path, file: HubFile, column: str) -> None:
        """Check size, checksum and footer of a downloaded file.

        Raises:
            OSError: when it differs from the hub's description, so that it is fetched again.
            DataError: when it agrees with it, but is not usable.
        """
        size = path.stat().st_size
        if size != file.size:
            raise OSError(f"it has {size} bytes instead of {file.size}")
        digest = file_sha256(path) if len(file.etag) == 64 else _blob_name(path, size)
        if digest != file.etag:
            raise OSError(f"its checksum is {digest} instead of {file.etag}")
        tail, kept = _tail(path), self._footer_path(file)
        self._parse_footer(file, tail, column)
        with suppress(FileNotFoundError):
            if kept.read_bytes() != tail:
                write_atomic(kept, tail)
                raise DataError(
                    f"the hub has sent another footer of {file.name} than the file has, and the run was planned with "
                    f"it: run the command again, with the footer of the file"
                )


class NotParquet(DataError):
    """A footer is not that of a parquet file."""


def _blob_name(path: Path, size: int) -> str:
    """The name that git gives a file's content, 40 hexadecimal digits."""
    digest = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _tail(path: Path) -> bytes:
    """The footer of a file on this machine, and the eight bytes after it."""
    with path.open("rb") as stream:

        def part(start: int) -> bytes:
            stream.seek(start)
            return stream.read()

        return footer_bytes(part, path.stat().st_size)


def _etag(path: Path) -> str:
    """Etag of a file in the hub's cache: the name of the blob that it links to; its sha256 where there are no links."""
    name = path.readlink().name if path.is_symlink() else ""
    return name if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", name) else file_sha256(path)
