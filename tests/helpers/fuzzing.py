"""Fuzz tests: how many inputs, and what must hold for a command whatever its input.

``make test`` tries the same seeded inputs each time, about a minute of them. ``NANOCHAT_FUZZ=60`` tries 60 times as
many, with new seeds each time; ``make test-slow`` sets it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from hypothesis import HealthCheck, settings

from helpers.support import Result, call
from nanochat_core.errors import PassesPlugins

FACTOR = int(os.environ.get("NANOCHAT_FUZZ", "1"))
SECONDS = 60.0  # of a processor, for one command: far more than any takes
BUSY = 10  # times as many seconds may pass, since the machine may be busy
LONGEST_LINE = 2000  # characters of an error message


def inputs(number: int) -> settings:
    """Settings of a hypothesis test, as a decorator: try ``number`` inputs, or FACTOR times as many."""
    return settings(
        max_examples=number * FACTOR,
        derandomize=FACTOR == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


class TookTooLong(PassesPlugins, BaseException):
    """A command that did not end in time; not an Exception, so that no handler of the product catches it."""


@contextlib.contextmanager
def time_limit(seconds: float = SECONDS) -> Iterator[None]:
    """Raise ``TookTooLong`` in the main thread when the ``with`` block computes for longer, or waits for very long."""
    timers = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, BUSY * seconds)}

    def handle(number: int, frame: FrameType | None) -> None:
        place = frame.f_code.co_filename if frame else "?"
        raise TookTooLong(f"after {timers[signal.Signals(number)][1]:g} s in {place}")

    before = {number: signal.signal(number, handle) for number in timers}
    for timer, limit in timers.values():
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def well_behaved(*arguments: object, codes: tuple[int, ...] = (0, 2), seconds: float = SECONDS) -> Result:
    """Run ``nanochat ARGUMENTS`` in this process, and check what must hold for every input: it ends in time with one of
    ``codes``, an error has a message, and the message has no traceback, control character or endless line.

    An exception that is not a user's error is raised, as ``call`` does.
    """
    with time_limit(seconds):
        result = call(*arguments)
    assert result.code in codes, (result.code, result.err[-2000:])
    assert_message(result)
    return result


def assert_message(result: Result) -> None:
    if result.code:
        assert result.err.strip(), "it failed without a word"
    for text in (result.err, result.out):
        assert "Traceback (most recent call last)" not in text, text[-4000:]
        bad = re.search(r"[^\n\t\r\x20-\x7e\xa0-\U0010ffff]", text)
        assert bad is None, f"control character {bad[0]!r} in: {text[max(bad.start() - 80, 0) : bad.end() + 80]!r}"
    assert max(map(len, result.err.splitlines()), default=0) <= LONGEST_LINE, result.err[:300]


def snapshot(directory: Path) -> dict[str, str]:
    """A digest of every file below ``directory`` by relative path, to see that a command changed nothing."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(directory.rglob("*"))
    }
