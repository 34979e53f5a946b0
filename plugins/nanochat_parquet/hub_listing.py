"""The files of a data set on the Hugging Face hub: their names, sizes and checksums, as the hub lists them.

The answers of the hub are recorded on disk, so that they are known when it can't be reached.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import attrs
from huggingface_hub import HfApi

from nanochat_core import DataError, first_few, lock_file, write_atomic
from nanochat_parquet.hub_errors import with_hub_retries

PATHS_PER_REQUEST = 500


@attrs.frozen
class HubFile:
    """A file of the data set.

    Args:
        name: path in the data set.
        etag: identifies the content: its sha256 for files as large as shards.
        size: in bytes.
    """

    name: str
    etag: str
    size: int


class Listing:
    """The list of files of one data set at one revision.

    The hub is asked once, when the list is first needed. When it does not answer, its last recorded answer is used.

    Args:
        repo: owner and name of the data set.
        revision: branch, tag or commit.
        directory: where the answers are recorded.
        endpoint: address of the hub; None: the one that the environment names.
        backoff: seconds before the second attempt; doubles with each further attempt.
    """

    def __init__(self, repo: str, revision: str, directory: Path, endpoint: str | None, backoff: float) -> None:
        self.repo, self.revision = repo, revision
        self._record = directory / f"{repo.replace('/', '--')}@{revision.replace('/', '--')}.json"
        self._api, self._backoff = HfApi(endpoint=endpoint), backoff

    @cached_property
    def _answer(self) -> tuple[str | None, list[str], DataError | None]:
        """Commit, sorted names of all files, and the error when the hub did not answer."""
        try:
            info = with_hub_retries(
                f"data set {self.repo}",
                lambda: self._api.dataset_info(self.repo, revision=self.revision, timeout=30),
                self._backoff,
                attempts=3,
            )
        except DataError as error:
            record = self._read_record()
            return record.get("commit"), record.get("names", []), error
        names = sorted(sibling.rfilename for sibling in info.siblings or [])
        self._write_record(info.sha, names, {})
        return info.sha, names, None

    @property
    def commit(self) -> str | None:
        """Commit of the revision; None when the hub does not answer and never did."""
        return self._answer[0]

    @property
    def offline(self) -> DataError | None:
        """The error when the hub does not answer, so that only files on this machine can be used; otherwise None."""
        return self._answer[2]

    def names(self, pattern: str) -> list[str]:
        """Sorted names of the files that match a pattern.

        Raises:
            DataError: when there are none.
        """
        names = [name for name in self._answer[1] if fnmatch.fnmatchcase(name, pattern)]
        if not names:
            if self.offline is not None:
                raise self.offline
            raise DataError(
                f"{self.repo} at {self.revision} has no files that match {pattern!r} on the hub; correct the pattern",
                key="files",
            )
        return names

    def files(self, names: Sequence[str]) -> list[HubFile]:
        """Files by name, with sizes and checksums from the hub, which must be available.

        Raises:
            DataError: when some don't exist, or the hub stops answering.
        """
        files: dict[str, HubFile] = {}
        for start in range(0, len(names), PATHS_PER_REQUEST):
            part = list(names[start : start + PATHS_PER_REQUEST])
            for info in with_hub_retries(f"data set {self.repo}", partial(self._paths_info, part), self._backoff):
                lfs = getattr(info, "lfs", None)
                files[info.path] = HubFile(info.path, lfs.sha256 if lfs else info.blob_id, info.size)
        missing = [name for name in names if name not in files]
        if missing:
            raise DataError(
                f"{self.repo} at {self.revision} has no {first_few(missing, 3)} on the hub; "
                f"lower data.shards, or set data.revision",
                key="shards",
            )
        self._write_record(self.commit, self._answer[1], files)
        return [files[name] for name in names]

    def _paths_info(self, names: list[str]) -> list[Any]:
        return list(self._api.get_paths_info(self.repo, names, revision=self.commit, repo_type="dataset"))

    def recorded(self, name: str) -> HubFile | None:
        """A file as the hub described it the last time it was asked; None when it never was."""
        facts = self._read_record().get("files", {}).get(name)
        return None if facts is None else HubFile(name, *facts)

    def _read_record(self) -> dict[str, Any]:
        """The last answer: ``commit``, ``names`` and, for some files, [etag, size] in ``files``; empty without one."""
        try:
            record: dict[str, Any] = json.loads(self._record.read_text())
            return record
        except (OSError, ValueError):
            return {}

    def _write_record(self, commit: str | None, names: Sequence[str], files: Mapping[str, HubFile]) -> None:
        with lock_file(self._record.with_suffix(".lock")):
            record = self._read_record()
            facts = record.get("files", {}) if record.get("commit") == commit else {}
            facts |= {file.name: [file.etag, file.size] for file in files.values()}
            write_atomic(self._record, json.dumps({"commit": commit, "names": names, "files": facts}))
