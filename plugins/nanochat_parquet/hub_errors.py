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

EDQUOT = getattr(errno, "EDQUOT", errno.ENOSPC)  # not every system has it


def hopeless(error: BaseException) -> str | None:
    """What to do about an error that waiting won't mend; None for those that pass."""
    if isinstance(error, OfflineModeIsEnabled) or isinstance(error.__cause__, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it"
    if isinstance(error, GatedRepoError):
        return "its owner grants access one by one: ask for it on the hub's page, then set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such data set, or it is private: check data.repo, or set HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return "there is no such revision: check data.revision"
    if isinstance(error, EntryNotFoundError):
        return "there is no such file in the data set: lower data.shards"
    if isinstance(error, HFValidationError):
        return f"{error}; write data.repo as owner/name"
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        code = error.response.status_code
        return None if code in (408, 429) or code >= 500 else f"the hub answers {code}; check data.repo and HF_TOKEN"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, EDQUOT):
        return f"{error}; make room, or set NANOCHAT_HOME to another directory"
    return None
