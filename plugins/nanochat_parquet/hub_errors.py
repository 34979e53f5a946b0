"""What to do about errors of the Hugging Face hub."""

from __future__ import annotations

import errno

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from nanochat_parquet.retries import Remedy

EDQUOT = getattr(errno, "EDQUOT", errno.ENOSPC)  # not every system has it


def remedy_for(error: BaseException) -> Remedy | None:
    """The remedy for an error that waiting does not mend; None for errors that pass."""
    if isinstance(error, OfflineModeIsEnabled) or isinstance(error.__cause__, OfflineModeIsEnabled):
        return Remedy("HF_HUB_OFFLINE is set; unset it")
    if isinstance(error, GatedRepoError):
        return Remedy("its owner grants access one by one: ask for it on the hub's page, then set HF_TOKEN")
    if isinstance(error, RepositoryNotFoundError):
        return Remedy("there is no such data set, or it is private: check data.repo, or set HF_TOKEN", "repo")
    if isinstance(error, RevisionNotFoundError):
        return Remedy("there is no such revision", "revision")
    if isinstance(error, EntryNotFoundError):
        return Remedy("there is no such file in the data set: lower data.shards", "shards")
    if isinstance(error, HFValidationError):
        return Remedy(f"{error}; write it as owner/name", "repo")
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        code = error.response.status_code
        passes = code in (408, 429) or code >= 500
        return None if passes else Remedy(f"the hub answers {code}; check data.repo and HF_TOKEN")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, EDQUOT):
        return Remedy(f"{error}; make room, or set NANOCHAT_HOME to another directory")
    return None
