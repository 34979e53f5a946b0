"""Trying again what may go well the next time, and saying what to do about the rest."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from nanochat_core import DataError

Result = TypeVar("Result")

ATTEMPTS = 6
EDQUOT = getattr(errno, "EDQUOT", errno.ENOSPC)  # not every system has it
LATER = "run it again when the network is back: what has arrived is kept"


def with_retries(what: str, work: Callable[[], Result], backoff: float, attempts: int = ATTEMPTS) -> Result:
    """What ``work`` returns.

    Args:
        what: it brings, for messages.
        backoff: seconds before the second attempt; doubles with every other.

    Raises:
        DataError: when it can't be had.
    """
    for attempt in range(attempts):
        try:
            return work()
        except DataError:
            raise
        except Exception as error:
            hopeless = _hopeless(error)
            if hopeless is not None:
                why, key = hopeless
                raise DataError(f"{what} can't be had from the hub: {why}", key=key) from error
            reason = error
        if attempt < attempts - 1:
            time.sleep(backoff * 2**attempt)
    text = f"{type(reason).__name__}: {str(reason).strip() or 'no details'}"
    raise DataError(f"{what} can't be had from the hub, after {attempts} attempts ({text}); {LATER}") from reason


def _hopeless(error: Exception) -> tuple[str, str] | None:
    """What to do about an error that waiting won't mend, and the option it is about, if any; None for those that
    pass."""
    if isinstance(error, OfflineModeIsEnabled) or isinstance(error.__cause__, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it", ""
    if isinstance(error, GatedRepoError):
        return "its owner grants access one by one: ask for it on the hub's page, then set HF_TOKEN", ""
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such data set, or it is private: check data.repo, or set HF_TOKEN", "repo"
    if isinstance(error, RevisionNotFoundError):
        return "there is no such revision", "revision"
    if isinstance(error, LocalEntryNotFoundError):  # huggingface_hub's word for "the hub can't be reached"
        return None
    if isinstance(error, EntryNotFoundError):
        return "there is no such file in the data set: lower data.shards", "shards"
    if isinstance(error, HFValidationError):
        return f"{error}; write it as owner/name", "repo"
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        code = error.response.status_code
        passes = code in (408, 429) or code >= 500
        return None if passes else (f"the hub answers {code}; check data.repo and HF_TOKEN", "")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, EDQUOT):
        return f"{error}; make room, or set HF_HOME to another directory", ""
    return None
