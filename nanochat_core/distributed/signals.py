"""A signal asks for a stop: remembered until the run can follow, or followed at once where nothing is lost by it."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

PREEMPTED_EXIT_CODE = 75  # "try again later": run the same command with --resume
SAME_SECONDS = 1.0  # a launcher and a terminal, or a job system, may both pass the same request on


class Stopped(BaseException):
    """A stop was asked for. No Exception, so that code that handles failures lets it through."""


class StopRequest:
    """SIGTERM, SIGINT and SIGUSR1 ask for a stop; a second one, which comes after a second at least, exits at once.
    Listens while it is entered."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._since = 0.0
        self._interruptible = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise ``Stopped`` in here as soon as a stop is asked for, or at once when it already has been."""
        before, self._interruptible = self._interruptible, True
        try:
            if self.signal is not None:
                raise Stopped
            yield
        finally:
            self._interruptible = before

    @contextlib.contextmanager
    def postponed(self) -> Iterator[None]:
        """What is done in here is done as a whole, such as what several ranks do together."""
        before, self._interruptible = self._interruptible, False
        try:
            yield
        finally:
            self._interruptible = before
        if before and self.signal is not None:
            raise Stopped

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            if time.monotonic() < self._since + SAME_SECONDS:
                return
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal, self._since = number, time.monotonic()
        if self._interruptible:
            raise Stopped
