"""Files of a data set on the Hugging Face hub: what there is, fetching it, checking it.

Credentials, mirrors (``HF_ENDPOINT``) and offline mode are those of ``huggingface_hub``. What its cache holds is used,
and nothing is written there: files that are fetched here lie under ``NANOCHAT_HOME``, named by their content. See
``Hub.fetch`` for why it is not ``hf_hub_download`` that fetches them.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import attrs
import pyarrow as pa
from huggingface_hub import HfApi, hf_hub_url, try_to_load_from_cache
from huggingface_hub import constants as hub_constants
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from nanochat_core import DataError, lock_file
from nanochat_parquet.documents import Footer, parse_footer
from nanochat_parquet.files import footer_bytes
from nanochat_parquet.hub_errors import remedy_for
from nanochat_parquet.retries import with_retries

ABANDONED = 3600.0  # seconds without a byte after which a part of a file belongs to nobody
PATHS_A_REQUEST = 500
ATTEMPTS = 6

Result = TypeVar("Result")


@attrs.frozen
class HubFile:
    """A file of the data set.

    Args:
        etag: names its content: the sha256, for files as large as shards.
        size: in bytes.
    """

    name: str
    etag: str
    size: int


class Hub:
    """One data set at one revision.

    Args:
        directory: where files, footers, locks and what the hub said last are kept.
        endpoint, hub_cache: the hub's address and the cache of other programs; None is what the environment says.
        backoff: seconds before the second attempt; doubles with every other.
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
        self._api = HfApi(endpoint=endpoint)

    # -- what there is

    @cached_property
    def _state(self) -> Path:
        return self._directory / f"{self.repo.replace('/', '--')}@{self.revision.replace('/', '--')}.json"

    @cached_property
    def _listing(self) -> tuple[str | None, list[str], DataError | None]:
        """Commit, names of all files, and why the hub did not answer. Without the hub: what it said the last time."""
        try:
            info = self._with_retries(
                f"data set {self.repo}",
                lambda: self._api.dataset_info(self.repo, revision=self.revision, timeout=30),
                attempts=3,
            )
        except DataError as error:
            known = self._known()
            return known.get("commit"), known.get("names", []), error
        names = sorted(sibling.rfilename for sibling in info.siblings or [])
        self._remember(info.sha, names, {})
        return info.sha, names, None

    def _with_retries(self, what: str, work: Callable[[], Result], attempts: int = ATTEMPTS) -> Result:
        return with_retries(
            f"{what} can't be had from the hub",
            work,
            remedy_for,
            attempts=attempts,
            pause=self._backoff,
            later="run it again when the network is back: what has arrived is kept",
        )

    def _known(self) -> dict[str, Any]:
        """What the hub said the last time: ``commit``, ``names`` and, of some, [etag, size] in ``files``."""
        try:
            known: dict[str, Any] = json.loads(self._state.read_text())
            return known
        except (OSError, ValueError):
            return {}

    def _remember(self, commit: str | None, names: Sequence[str], files: Mapping[str, HubFile]) -> None:
        """Keep what the hub says, for when it can't be asked."""
        with lock_file(self._state.with_suffix(".lock")):
            known = self._known()
            facts = known.get("files", {}) if known.get("commit") == commit else {}
            facts |= {file.name: [file.etag, file.size] for file in files.values()}
            write_atomically(self._state, json.dumps({"commit": commit, "names": names, "files": facts}).encode())

    @property
    def offline(self) -> DataError | None:
        """Why only what is on this machine can be used, or None."""
        return self._listing[2]

    def names(self, pattern: str) -> list[str]:
        """Names of the data set's files, sorted."""
        found = [name for name in self._listing[1] if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            if self.offline is not None:
                raise self.offline
            raise DataError(f"{self.repo} at {self.revision} has no files {pattern!r} on the hub", key="files")
        return found

    def files(self, names: Sequence[str]) -> list[HubFile]:
        """Size and etag of files.

        Raises:
            DataError: when some don't exist; offline, when some are not on this machine.
        """
        if self.offline is not None:
            return self._local_files(names)
        found: dict[str, HubFile] = {}
        for start in range(0, len(names), PATHS_A_REQUEST):
            part = list(names[start : start + PATHS_A_REQUEST])
            infos = self._with_retries(f"data set {self.repo}", partial(self._paths_info, part))
            for info in infos:
                lfs = getattr(info, "lfs", None)
                found[info.path] = HubFile(info.path, lfs.sha256 if lfs else info.blob_id, info.size)
        missing = [name for name in names if name not in found]
        if missing:
            raise DataError(
                f"{self.repo} at {self.revision} has no {_some(missing)} on the hub; "
                f"lower data.shards, or set data.revision",
                key="shards",
            )
        self._remember(self._listing[0], self._listing[1], found)
        return [found[name] for name in names]

    def _paths_info(self, names: list[str]) -> list[Any]:
        return list(self._api.get_paths_info(self.repo, names, revision=self._listing[0], repo_type="dataset"))

    def _local_files(self, names: Sequence[str]) -> list[HubFile]:
        found = {name: self._local_file(name) for name in names}
        missing = [name for name, file in found.items() if file is None]
        if missing:
            raise DataError(
                f"{_some(missing)} of {self.repo} ({len(missing)} of {len(names)} files) are not on this "
                f"machine, and the hub can't be asked ({self.offline}); lower data.shards to what is here, or run "
                f"`nanochat data download` with a network (and HF_HUB_OFFLINE unset)",
                key="shards",
            )
        return [file for file in found.values() if file is not None]

    def _local_file(self, name: str) -> HubFile | None:
        """A file that is on this machine, by what the hub said the last time, or by what its cache says."""
        facts = self._known().get("files", {}).get(name)
        if facts is not None and self.local(HubFile(name, *facts)) is not None:
            return HubFile(name, *facts)
        path = self._cached(name)
        return None if path is None else HubFile(name, _etag(path), path.stat().st_size)

    def _cached(self, name: str) -> Path | None:
        """Where the hub's own cache has a file."""
        # A cache that another program filled has its own record of the commit behind a branch.
        for revision in (self._listing[0], self.revision):
            if revision is not None:
                found = try_to_load_from_cache(
                    self.repo, name, repo_type="dataset", revision=revision, cache_dir=self._hub_cache
                )
                if isinstance(found, str):
                    return Path(found)
        return None

    def local(self, file: HubFile) -> Path | None:
        """Where a file is on this machine, or None when it isn't, or isn't whole."""
        own = self._path(file)
        if own.is_file() and own.stat().st_size == file.size:
            return own
        path = self._cached(file.name)
        if path is None or path.stat().st_size != file.size:
            return None
        return path if not path.is_symlink() or _etag(path) == file.etag else None

    # -- footers

    def footer(self, file: HubFile, column: str) -> Footer:
        """What the footer of a file says, fetched from the hub (some KB) when neither it nor the file is here.

        Raises:
            DataError: when the column is missing, or the hub doesn't answer.
        """
        known = self._directory / "footers" / file.etag
        name = f"{file.name} of {self.repo}"
        try:
            return parse_footer(name, known.read_bytes(), column)
        except (OSError, pa.ArrowException):  # not there, or damaged
            pass
        path = self.local(file)
        if path is not None:
            with path.open("rb") as stream:
                tail = footer_bytes(lambda start: _read_from(stream, start), file.size)
        else:
            tail = footer_bytes(lambda start: self._range(file, start), file.size)
        try:
            footer = parse_footer(name, tail, column)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{name} of {self.repo} is not a parquet file ({error})") from error
        write_atomically(known, tail)
        return footer

    def _range(self, file: HubFile, start: int) -> bytes:
        """Bytes from ``start`` to the end, from the hub."""

        def get() -> bytes:
            with self._request(file, f"bytes={start}-{file.size - 1}") as response:
                data: bytes = response.read()
            data = data[start:] if response.status_code == 200 else data
            if len(data) != file.size - start:
                raise OSError(f"{len(data)} bytes instead of {file.size - start}")
            return data

        return self._with_retries(f"the footer of {file.name}", get)

    @contextmanager
    def _request(self, file: HubFile, part: str) -> Iterator[Any]:
        """The hub's answer to a request for a part of a file, before its content is read."""
        url = hf_hub_url(self.repo, file.name, repo_type="dataset", revision=self._listing[0], endpoint=self._endpoint)
        headers = {**build_hf_headers(), "Range": part, "Accept-Encoding": "identity"}
        timeout = hub_constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
            hf_raise_for_status(response)
            yield response

    # -- whole files

    @cached_property
    def _files(self) -> Path:
        return self._directory / "files" / self.repo.replace("/", "--")

    def _path(self, file: HubFile) -> Path:
        return self._files / file.etag

    def _partial(self, file: HubFile) -> Path:
        """What has arrived of a file. Machines that share a disk have one each: not all disks lock between machines."""
        return self._files / f"{file.etag}.{platform.node()}.part"

    def check_disk_space(self, files: Sequence[HubFile]) -> None:
        """Check that there is room for files, after removing what killed downloads of other files have left.

        Raises:
            DataError: with what is free and what is needed.
        """
        parts = {self._partial(file) for file in files}
        for left in self._files.glob("*.part"):
            with suppress(OSError):
                if left not in parts and time.time() - left.stat().st_mtime > ABANDONED:
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
        """Bring a file here and check it, unless it is here. Other processes that want it wait until it is.

        A download that was killed goes on where it stopped. ``hf_hub_download`` can't do that: each call writes to a
        file with a random name. With huggingface_hub 2.4, with and without ``HF_HUB_DISABLE_XET``, a process that was
        killed after 10 of 45 MB left these behind for ever, and the next one asked for all 45 MB.

        Args:
            progress: called with numbers of bytes as they arrive; negative when some have to be fetched again.

        Raises:
            DataError: when it can't be had.
        """
        told = 0

        def tell(received: int) -> None:
            nonlocal told
            progress(received - told)
            told = received

        part = self._partial(file)

        def get() -> Path:
            self._receive(file, part, tell)
            try:
                self._check(part, file, column)
            except OSError:
                part.unlink()
                raise
            return part.replace(self._path(file))

        with lock_file(self._directory / "locks" / f"{file.etag}.lock"):
            path = self.local(file) or self._with_retries(f"{file.name} of {self.repo}", get)
        tell(file.size)
        return path

    def _receive(self, file: HubFile, part: Path, tell: Callable[[int], None]) -> None:
        """Append to ``part`` what is missing of a file. Connections may break, as long as each brings something."""
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as stream:
            while stream.tell() < file.size:
                before = stream.tell()
                try:
                    self._receive_some(file, stream, tell)
                except Exception:
                    if stream.tell() <= before:
                        raise

    def _receive_some(self, file: HubFile, stream: BinaryIO, tell: Callable[[int], None]) -> None:
        """One request for all that is missing."""
        with self._request(file, f"bytes={stream.tell()}-") as response:
            if response.status_code != 206:  # a server that knows no ranges sends all of it
                stream.seek(0)
                stream.truncate()
            tell(stream.tell())
            for block in response.iter_bytes():
                stream.write(block)
                tell(stream.tell())
            stream.flush()

    def _check(self, path: Path, file: HubFile, column: str) -> None:
        """Refuse a file that isn't what the hub says it has.

        Raises:
            OSError: so that it is fetched again.
            DataError: when it is, but isn't usable.
        """
        size = path.stat().st_size
        if size != file.size:
            raise OSError(f"it has {size} bytes instead of {file.size}")
        if len(file.etag) == 64:
            digest = _sha256(path)
            if digest != file.etag:
                raise OSError(f"its sha256 is {digest} instead of {file.etag}")
        self.footer(file, column)


def _etag(path: Path) -> str:
    """Of a file in the hub's cache: the name of the blob it links to; where links are not supported, its sha256."""
    return path.readlink().name if path.is_symlink() else _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_from(stream: Any, start: int) -> bytes:
    stream.seek(start)
    data: bytes = stream.read()
    return data


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def write_atomically(path: Path, data: bytes) -> None:
    """Several processes may write the same file at once: each replaces it with a complete one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
