"""The files of a data set on the Hugging Face hub: their names, sizes and checksums, as the hub lists them.

The answers of the hub are recorded on disk, so that they are known when it can't be reached. Nothing in an answer is
used before it is checked, since names, commits and checksums become parts of paths and addresses.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import attrs
from huggingface_hub import constants as hub_constants
from huggingface_hub.utils import validate_repo_id

from nanochat_core import DataError, first_few, lock_file, name_problem, read_json, shorten, write_atomic
from nanochat_parquet.hub_errors import with_hub_retries
from nanochat_parquet.hub_requests import request_json, unusable

PATHS_PER_REQUEST = 500
LARGEST = 1 << 50  # bytes of a file


@attrs.frozen
class HubFile:
    """A file of the data set.

    Args:
        name: path in the data set.
        etag: digest of the content, in hexadecimal digits: 64 of its sha256, or 40 of its name as a blob of git.
        size: in bytes.

    Raises:
        ValueError: when one of them can't be that.
    """

    name: str
    etag: str
    size: int

    def __attrs_post_init__(self) -> None:
        problem = name_problem(self.name, nested=True)
        if problem:
            raise ValueError(f"the name {shorten(self.name)} {problem}")
        if not _is_digest(self.etag, 40, 64):
            raise ValueError(f"the checksum of {self.name} is {shorten(self.etag)}, not 40 or 64 hexadecimal digits")
        if type(self.size) is not int or not 0 <= self.size <= LARGEST:
            raise ValueError(f"the size of {self.name} is {shorten(self.size)}")


def _is_digest(value: object, *lengths: int) -> bool:
    return isinstance(value, str) and len(value) in lengths and re.fullmatch("[0-9a-f]+", value) is not None


class Listing:
    """The list of files of one data set at one revision.

    The hub is asked once, when the list is first needed. When it does not answer, its last recorded answer is used.

    Args:
        repo: owner and name of the data set.
        revision: branch, tag or commit.
        directory: where the answers are recorded.
        endpoint: address of the hub; None: the one that the environment names.
        backoff: seconds before the second attempt; doubles with each further attempt.

    Raises:
        DataError: when ``repo`` or ``revision`` can't be a name.
    """

    def __init__(self, repo: str, revision: str, directory: Path, endpoint: str | None, backoff: float) -> None:
        for key, name in (("repo", repo), ("revision", revision)):
            problem = name_problem(name, nested=True)
            if problem:
                raise DataError(f"{shorten(name)} {problem}", key=key)
        self.repo, self.revision = repo, revision
        self._record = directory / f"{repo.replace('/', '--')}@{revision.replace('/', '--')}.json"
        self._api = f"{endpoint or hub_constants.ENDPOINT}/api/datasets/{repo}"
        self._backoff = backoff

    @cached_property
    def _answer(self) -> tuple[str | None, list[str], DataError | None]:
        """Commit, sorted names of all files, and the error when the hub did not answer."""
        try:
            validate = partial(validate_repo_id, self.repo)
            with_hub_retries(f"data set {self.repo}", validate, self._backoff, attempts=1)
            commit, names = with_hub_retries(f"data set {self.repo}", self._overview, self._backoff, attempts=3)
        except DataError as error:
            record = self._read_record()
            return record.get("commit"), record.get("names", []), error
        self._write_record(commit, names, {})
        return commit, names, None

    def _overview(self) -> tuple[str, list[str]]:
        """Commit and sorted names of all files, from the hub."""
        answer = request_json("GET", f"{self._api}/revision/{quote(self.revision, safe='')}")
        siblings = answer.get("siblings") if isinstance(answer, dict) else None
        if not isinstance(siblings, list) or not all(isinstance(entry, dict) for entry in siblings):
            raise unusable("it has no list of files")
        if not _is_digest(answer.get("sha"), 40):
            raise unusable(f"its commit is {shorten(answer.get('sha'))}, not 40 hexadecimal digits")
        names = [entry.get("rfilename") for entry in siblings]
        return answer["sha"], sorted(name for name in names if isinstance(name, str))

    @property
    def commit(self) -> str | None:
        """Commit of the revision; None when the hub does not answer and never did."""
        return self._answer[0]

    @property
    def offline(self) -> DataError | None:
        """The error when the hub does not answer, so that only files on this machine can be used; otherwise None."""
        return self._answer[2]

    def names(self, pattern: str) -> list[str]:
        """Sorted names of the files that match a pattern. Those in hidden directories, and hidden files, do not.

        Raises:
            DataError: when there are none, or one can't be a name.
        """
        names = [name for name in self._answer[1] if fnmatch.fnmatchcase(name, pattern) and not _is_hidden(name)]
        for name in names:
            problem = name_problem(name, nested=True)
            if problem:
                raise unusable(f"the name of a file, {shorten(name)}, {problem}")
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
            facts = with_hub_retries(f"data set {self.repo}", partial(self._paths_info, part), self._backoff)
            files |= {file.name: file for file in facts}
        missing = [name for name in names if name not in files]
        if missing:
            raise DataError(
                f"{self.repo} at {self.revision} has no {first_few(missing, 3)} on the hub; "
                f"lower data.shards, or set data.revision",
                key="shards",
            )
        self._write_record(self.commit, self._answer[1], files)
        return [files[name] for name in names]

    def _paths_info(self, names: list[str]) -> list[HubFile]:
        """Those of the files that exist, from the hub."""
        answer = request_json("POST", f"{self._api}/paths-info/{self.commit}", {"paths": names, "expand": False})
        if not isinstance(answer, list) or not all(isinstance(entry, dict) for entry in answer):
            raise unusable("it is not a list of files")
        files = []
        for entry in answer:
            if entry.get("path") in names and entry.get("type") == "file":
                lfs = entry.get("lfs")
                etag: Any = lfs.get("oid") if isinstance(lfs, dict) else entry.get("oid")
                size: Any = entry.get("size")
                try:
                    files.append(HubFile(entry["path"], etag, size))
                except ValueError as error:
                    raise unusable(str(error)) from None
        return files

    def recorded(self, name: str) -> HubFile | None:
        """A file as the hub described it the last time it was asked; None when it never was."""
        facts = self._read_record().get("files", {}).get(name)
        try:
            return HubFile(name, *facts) if isinstance(facts, list) else None
        except (TypeError, ValueError):
            return None

    def _read_record(self) -> dict[str, Any]:
        """The last answer: ``commit``, ``names`` and, for some files, [etag, size] in ``files``; empty without one."""
        try:
            record = read_json(self._record)
        except (OSError, ValueError):
            return {}
        names, files = record.get("names"), record.get("files")
        is_sound = isinstance(names, list) and all(isinstance(name, str) for name in names) and isinstance(files, dict)
        return record if is_sound and _is_digest(record.get("commit"), 40) else {}

    def _write_record(self, commit: str | None, names: Sequence[str], files: Mapping[str, HubFile]) -> None:
        with lock_file(self._record.with_suffix(".lock")):
            record = self._read_record()
            facts = record.get("files", {}) if record.get("commit") == commit else {}
            facts |= {file.name: [file.etag, file.size] for file in files.values()}
            write_atomic(self._record, json.dumps({"commit": commit, "names": names, "files": facts}))


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))
