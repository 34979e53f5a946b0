"""Trying again what may go well the next time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from nanochat_core import DataError

Result = TypeVar("Result")


class Remedy(NamedTuple):
    """What a user can do about an error that another attempt does not mend.

    Args:
        text: ends the message.
        key: the option that it is about, if any.
    """

    text: str
    key: str = ""


def with_retries(
    failed: str,
    work: Callable[[], Result],
    remedy_for: Callable[[BaseException], Remedy | None],
    *,
    attempts: int = 6,
    pause: float = 1.0,
    later: str = "",
    key: str = "",
) -> Result:
    """What ``work`` returns.

    Args:
        failed: begins the message, as in ``the list of shards can't be had``.
        remedy_for: gives the remedy for an error that another attempt does not mend; None for errors that pass.
        pause: seconds before the second attempt; doubles with every other.
        later: ends the message of errors that did not pass.
        key: the option that the message is about, unless the remedy names one.

    Raises:
        DataError: when all attempts have failed; or what ``work`` raises of that kind, at once.
    """
    retrying = Retrying(
        stop=stop_after_attempt(attempts),
        wait=wait_exponential(multiplier=pause),
        retry=retry_if_exception(
            lambda e: isinstance(e, Exception) and not isinstance(e, DataError) and remedy_for(e) is None
        ),
        reraise=True,
    )
    try:
        return retrying(work)
    except DataError:
        raise
    except Exception as error:
        remedy = remedy_for(error)
        if remedy is not None:
            raise DataError(f"{failed}: {remedy.text}", key=remedy.key or key) from error
        text = f"{type(error).__name__}: {str(error).strip() or 'no details'}"
        raise DataError(f"{failed}, after {attempts} attempts ({text}){later and f'; {later}'}", key=key) from error
