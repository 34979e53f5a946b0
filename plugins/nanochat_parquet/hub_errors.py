"""Errors of the Hugging Face hub: which of them are worth another attempt, and what to do about the others."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

from nanochat_core import Problem
from nanochat_parquet.hub_requests import Refused
from nanochat_parquet.retries import with_retries

Result = TypeVar("Result")

ATTEMPTS = 6
# By the hub's own names.
REFUSALS = {
    "GatedRepo": Problem("", "its owner grants access: request it on the page of the data set, then set HF_TOKEN"),
    "RepoNotFound": Problem("repo", "there is no such data set, or it is private: check data.repo, or set HF_TOKEN"),
    "RevisionNotFound": Problem("revision", "there is no such revision: check data.revision"),
    "EntryNotFound": Problem("shards", "there is no such file in the data set: lower data.shards"),
}
EDQUOT = getattr(errno, "EDQUOT", errno.ENOSPC)  # not every system has it


def with_hub_retries(what: str, work: Callable[[], Result], backoff: float, attempts: int = ATTEMPTS) -> Result:
    """Return the result of a request to the hub, repeated while its errors may be temporary.

    Args:
        what: the thing that is requested, for the error message.
        work: makes the request.
        backoff: seconds before the second attempt; doubles with each further attempt.

    Raises:
        DataError: when all attempts have failed, or another attempt would not help.
    """
    return with_retries(
        f"{what} can't be fetched from the hub",
        work,
        permanent_problem,
        attempts=attempts,
        backoff=backoff,
        remedy="run the command again when the network is back: what has arrived so far is kept",
    )


def permanent_problem(error: BaseException) -> Problem | None:
    """Problem and option for an error that another attempt won't remove; None for errors that may be temporary."""
    if isinstance(error, OfflineModeIsEnabled) or isinstance(error.__cause__, OfflineModeIsEnabled):
        return Problem("", "HF_HUB_OFFLINE is set; unset it")
    if isinstance(error, HFValidationError):
        return Problem("repo", f"{error}; write it as owner/name")
    if isinstance(error, Refused):
        if error.code in REFUSALS:
            return REFUSALS[error.code]
        if error.status == 401:
            return REFUSALS["RepoNotFound"]
        temporary = error.status in (408, 429) or error.status >= 500
        return None if temporary else Problem("", f"{error}; check data.repo and HF_TOKEN")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, EDQUOT):
        return Problem("", f"{error}; make room, or set NANOCHAT_HOME to another directory")
    return None
