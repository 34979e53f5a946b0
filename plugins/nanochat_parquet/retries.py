"""Repeating requests that may succeed at another attempt."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from nanochat_core import DataError, Problem

Result = TypeVar("Result")


def with_retries(
    failed: str,
    work: Callable[[], Result],
    permanent: Callable[[BaseException], Problem | None],
    *,
    attempts: int,
    backoff: float,
    remedy: str,
    key: str = "",
) -> Result:
    """Return the result of ``work``, which is repeated while its errors may be temporary.

    Args:
        failed: beginning of the error message, as in ``the list of shards can't be fetched``.
        work: the request.
        permanent: returns the problem for an error that another attempt won't remove; None for errors that may be
            temporary.
        attempts: how often ``work`` is called at most.
        backoff: seconds before the second attempt; doubles with each further attempt.
        remedy: end of the error message when all attempts have failed.
        key: option that such an error is about.

    Raises:
        DataError: when all attempts have failed or another attempt would not help; a DataError of ``work``, at once.
    """
    retrying = Retrying(
        stop=stop_after_attempt(attempts),
        wait=wait_exponential(multiplier=backoff),
        retry=retry_if_exception(
            lambda e: isinstance(e, Exception) and not isinstance(e, DataError) and permanent(e) is None
        ),
        reraise=True,
    )
    try:
        return retrying(work)
    except DataError:
        raise
    except Exception as error:
        problem = permanent(error)
        if problem is not None:
            raise DataError(f"{failed}: {problem.message}", key=problem.key) from error
        said = "".join(c if c.isprintable() else " " for c in str(error)).strip()  # it may quote what the server says
        text = f"{type(error).__name__}: {said[:300] or 'no details'}"
        raise DataError(f"{failed}, after {attempts} attempts ({text}); {remedy}", key=key) from error
