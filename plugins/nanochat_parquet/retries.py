"""Trying again what may go well the next time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from nanochat_core import DataError

Result = TypeVar("Result")


def with_retries(
    failed: str,
    work: Callable[[], Result],
    hopeless: Callable[[BaseException], str | None],
    *,
    attempts: int = 6,
    pause: float = 1.0,
    remedy: str = "",
) -> Result:
    """What ``work`` returns.

    Args:
        failed: begins the message, as in ``data: the list of shards can't be had``.
        hopeless: what to do about an error that another attempt won't mend; None for those that pass.
        pause: seconds before the second attempt; doubles with every other.
        remedy: ends the message of errors that did not pass.

    Raises:
        DataError: when all attempts have failed; or what ``work`` raises of that kind, at once.
    """
    retrying = Retrying(
        stop=stop_after_attempt(attempts),
        wait=wait_exponential(multiplier=pause),
        retry=retry_if_exception(
            lambda e: isinstance(e, Exception) and not isinstance(e, DataError) and not hopeless(e)
        ),
        reraise=True,
    )
    try:
        return retrying(work)
    except DataError:
        raise
    except Exception as error:
        why = hopeless(error)
        if why is not None:
            raise DataError(f"{failed}: {why}") from error
        text = f"{type(error).__name__}: {str(error).strip() or 'no details'}"
        raise DataError(f"{failed}, after {attempts} attempts ({text}){remedy and f'; {remedy}'}") from error
