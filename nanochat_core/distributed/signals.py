"""Signals that ask a run to stop: remembered until the step ends, or raised at once where nothing is lost."""

from __future__ import annotations

import _thread
import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from nanochat_core.errors import PassesPlugins

PREEMPTED_EXIT_CODE = 75  # "try again later": run the same command with --resume
SAME_SECONDS = 1.0  # a launcher and a terminal, or a job system, may both pass the same request on
REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU)
# A terminal that closes, and a limit of CPU time that the kernel repeats every second: no second request to hurry.
PATIENT = (signal.SIGHUP, signal.SIGXCPU)
AGAIN_SECONDS = 0.05  # until a request is followed that came where an exception would be lost


def stop_signals() -> list[signal.Signals]:
    """Return the signals that ask a run to stop: SIGHUP only if it is not ignored, as under nohup."""
    return [n for n in REQUESTS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


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
    """The stop that SIGTERM, SIGINT, SIGUSR1, SIGHUP and SIGXCPU ask for, once ``install`` was called or within a
    ``with`` block. A second signal that comes a second or more after the first one exits at once, unless it is SIGHUP
    or SIGXCPU."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._since = 0.0
        self._interruptible = False
        self._again = False  # our own thread repeats a signal
        self._over = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def install(self) -> None:
        """Handle the signals from now on."""
        for number in stop_signals():
            self._before[number] = signal.signal(number, self._handle)

    def over(self) -> None:
        """There is nothing left to stop: a first signal that comes later has no effect, since the exit code is that of
        the end."""
        self._over = True

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

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self._again = self._again, False
        if self.signal is not None and not again:
            if time.monotonic() < self._since + SAME_SECONDS or number in PATIENT:
                return
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not again:
            self.signal, self._since = number, time.monotonic()
        if self._interruptible and not self._over:
            if _loses_exceptions(frame):
                _thread.start_new_thread(self._repeat, (number,))  # threading's own locks may be held by this thread
                return
            raise Stopped

    def _repeat(self, number: int) -> None:
        time.sleep(AGAIN_SECONDS)
        self._again = True
        signal.pthread_kill(threading.main_thread().ident or 0, number)


def _loses_exceptions(frame: FrameType | None) -> bool:
    """Whether an exception that is raised in ``frame`` would only be printed, as "Exception ignored in": in what Python
    calls when an object is deleted."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__del__" or frame.f_globals.get("__name__") in (
            "weakref",
            "_weakrefset",
            "torch.utils.weak",
        ):
            return True
        # imports have a callback of weak references that releases their locks
        if code.co_name == "cb" and frame.f_globals.get("__name__") in ("importlib._bootstrap", "_frozen_importlib"):
            return True
        frame = frame.f_back
    return False
