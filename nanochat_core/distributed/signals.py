"""Signals that ask a run to stop: remembered until the step ends, or raised at once where nothing is lost."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from nanochat_core.errors import PassesPlugins

PREEMPTED_EXIT_CODE = 75  # "try again later": run the same command with --resume
SAME_SECONDS = 1.0  # a launcher and a terminal, or a job system, may both pass the same request on


class Stopped(PassesPlugins, BaseException):
    """A stop was requested. It is not an Exception subclass, so that code that handles failures lets it through."""


class Interrupted(PassesPlugins, KeyboardInterrupt):
    """Ctrl-C in a command that has nothing to save. Any other KeyboardInterrupt was raised by a plugin."""


@contextlib.contextmanager
def interruptible_command() -> Iterator[None]:
    """A context in which Ctrl-C raises ``Interrupted``, unless somebody else handles it already."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(_: int, frame: FrameType | None) -> None:
    raise Interrupted


class StopRequest:
    """A context in which SIGTERM, SIGINT and SIGUSR1 ask for a stop. A second signal that comes a second or more after
    the first one exits at once."""

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
        """A context in which ``Stopped`` is raised as soon as a stop is asked for, or on entering if it already was."""
        before, self._interruptible = self._interruptible, True
        try:
            if self.signal is not None:
                raise Stopped
            yield
        finally:
            self._interruptible = before

    @contextlib.contextmanager
    def postponed(self) -> Iterator[None]:
        """A context that is not interrupted, for what several ranks must do together."""
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
