"""Settings of the process that code of a plugin may change and forget to put back. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs


@attrs.frozen
class Setting:
    """A setting of the process: how it is read and set."""

    read: Callable[[], Any]
    write: Callable[[Any], Any]


def _directory() -> str:
    try:
        return os.getcwd()  # noqa: PTH109 (as it is, also when it has been deleted)
    except OSError:
        return ""


def _enter(directory: str) -> None:
    if directory:
        os.chdir(directory)


def _umask() -> int:
    with contextlib.suppress(OSError, ValueError, IndexError), Path("/proc/self/status").open("rb", 0) as file:
        return int(file.read(200).partition(b"Umask:")[2].split(maxsplit=1)[0], 8)
    before = os.umask(0o077)  # elsewhere, reading it means setting it for a moment
    os.umask(before)
    return before


_SIGNALS = (
    signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE,
    signal.SIGALRM, signal.SIGCHLD, signal.SIGXCPU, signal.SIGTSTP, signal.SIGCONT,
)  # fmt: skip


def _handlers() -> dict[signal.Signals, Any]:
    """Handlers of signals that were set in Python or are the system's."""
    found = {number: signal.getsignal(number) for number in _SIGNALS}
    return {number: handler for number, handler in found.items() if handler is not None}


def _set_handlers(handlers: Mapping[signal.Signals, Any]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def _streams() -> tuple[Any, Any]:
    return sys.stdout, sys.stderr


def _set_streams(streams: tuple[Any, Any]) -> None:
    sys.stdout, sys.stderr = streams


SETTINGS: Mapping[str, Setting] = {
    "working directory": Setting(_directory, _enter),
    "umask": Setting(_umask, os.umask),
    "signal handlers": Setting(_handlers, _set_handlers),
    "stdout and stderr": Setting(_streams, _set_streams),
    "recursion limit": Setting(sys.getrecursionlimit, sys.setrecursionlimit),
}


def _path() -> list[str]:
    return list(sys.path)


def _set_path(path: list[str]) -> None:
    sys.path[:] = [*path, *(entry for entry in sys.path if entry not in path)]  # what was added stays, behind


def _set_environment(before: dict[str, str]) -> None:
    os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


# Settings for the import of a plugin's module, which may add to the environment and the path.
IMPORT_SETTINGS: Mapping[str, Setting] = {
    **SETTINGS,
    "sys.path": Setting(_path, _set_path),
    "environment": Setting(lambda: dict(os.environ), _set_environment),
}


class Surroundings:
    """The settings of the process at one moment, to which it can be put back."""

    def __init__(self, settings: Mapping[str, Setting] = SETTINGS) -> None:
        self._settings = settings
        self._before = {name: setting.read() for name, setting in settings.items()}

    def put_back(self) -> list[str]:
        """Put back what has changed. Returns the names of these settings."""
        changed = []
        for name, setting in self._settings.items():
            if setting.read() != self._before[name]:
                setting.write(self._before[name])
                changed.append(name)
        return changed
