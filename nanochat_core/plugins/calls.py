"""Calls into plugins: whatever a plugin raises is that plugin's failure, told in one line. Imports no torch."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import signal
import sys
import threading
import traceback
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nanochat_core.errors import NanochatError, PassesPlugins, PluginError
from nanochat_core.plugins.distribution import GROUP, NAME, identify
from nanochat_core.plugins.surroundings import IMPORT_SETTINGS, Setting, Surroundings

_CORE = str(Path(__file__).parents[1])
_LONGEST = 600  # characters of a plugin's message
# What torch says of the machine or of another rank: callers have messages of their own for it.
_OF_TORCH = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "gloo/", "NCCL")


SLOW_SECONDS, MOST_SECONDS = 10.0, 60.0  # of an import: after which it is named, and given up

_titles: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def remember(part: Any, title: str) -> None:
    """Remember what messages call a part that a plugin's factory has made."""
    with contextlib.suppress(Exception):  # it can't be hashed, or has no weak references
        _titles[part] = title


def title_of(part: Any) -> str:
    """Return what messages call a part of a plugin, such as ``model 'mine' of my-package 1.0``."""
    try:
        return _titles[part]
    except Exception:
        return f"{type(part).__module__}.{type(part).__qualname__}"


def breaks(part: Any, rule: str) -> PluginError:
    """Return the error for a part of a plugin that breaks a rule of its contract."""
    return PluginError(f"{title_of(part)} breaks its contract: {rule}")


@contextlib.contextmanager
def plugin_call(what: str) -> Iterator[None]:
    """Return a context for code of a plugin.

    Args:
        what: beginning of the message, such as ``model 'mine' of my-package 1.0 can't be built``.

    Raises:
        PluginError: for anything that the plugin raises, ``SystemExit`` and ``KeyboardInterrupt`` included, except
            errors for users, requests to stop, Ctrl-C, and what torch says about memory and other ranks.
    """
    try:
        yield
    except BaseException as error:
        if is_not_a_plugins(error):
            raise
        raise PluginError(f"{what}: {describe(error)}") from error


@contextlib.contextmanager
def importing(what: str, settings: Mapping[str, Setting] = IMPORT_SETTINGS) -> Iterator[None]:
    """Return a context for imports of a plugin's modules.

    What they print goes to stderr, since stdout is the output of the command. What they change of the process, except
    by adding to it, is put back. In the main thread an import that takes long is named, and one that does not end is
    given up.

    Args:
        what: what is imported, as in ``plugin 'mine' of my-package``.
        settings: what is put back.

    Raises:
        PluginError: when the import does not end.
    """
    stderr, surroundings = sys.stderr, Surroundings(settings)
    try:
        with contextlib.redirect_stdout(_ToStderr(stderr)), _limited(what, stderr):
            yield
    except KeyboardInterrupt as error:
        if is_not_a_plugins(error) and stderr is not None:
            stderr.write(f"interrupted while loading {what}\n")
        raise
    finally:
        surroundings.put_back()


@contextlib.contextmanager
def _limited(what: str, stderr: Any) -> Iterator[None]:
    """Name an import after ``SLOW_SECONDS``, and end it after ``MOST_SECONDS``, unless somebody uses the timer."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or any(signal.getitimer(signal.ITIMER_REAL)):
        yield
        return
    told = False

    def handle(_: int, frame: Any) -> None:
        nonlocal told
        if told:
            raise PluginError(f"its import took longer than {MOST_SECONDS:g} s")
        told = True
        if stderr is not None:
            stderr.write(f"loading {what} takes long; it is left out after {MOST_SECONDS:g} s, Ctrl-C ends it now\n")

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, SLOW_SECONDS, MOST_SECONDS - SLOW_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class _ToStderr(io.TextIOBase):
    """A stream to stderr, which a plugin may close without harm."""

    def __init__(self, stderr: Any) -> None:
        self._stderr = stderr

    def write(self, text: str) -> int:
        if self._stderr is not None:
            self._stderr.write(text)
        return len(text)

    def flush(self) -> None:
        if self._stderr is not None:
            self._stderr.flush()

    def close(self) -> None:
        pass


def is_not_a_plugins(error: BaseException) -> bool:
    """Whether an exception that comes out of a plugin is not a failure of the plugin."""
    if isinstance(error, NanochatError | PassesPlugins):
        return True
    if isinstance(error, KeyboardInterrupt):  # with a handler of ours, Ctrl-C raises something else
        return signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if any(base.__name__ in ("OutOfMemoryError", "DistError") for base in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(text in message_of(error) for text in _OF_TORCH)


def describe(error: BaseException) -> str:
    """Return an exception as one line: its type, its message, and the place in the code where it was raised."""
    message = message_of(error)
    return f"{type(error).__name__}{': ' if message else ''}{message}{_places(error)}"


def message_of(error: BaseException) -> str:
    """Return the text of an exception as one printable line that is not too long, whatever its ``__str__`` does."""
    try:
        text = " ".join(str(error).split())
    except BaseException as second:  # its code is a plugin's as well
        if isinstance(second, PassesPlugins):
            raise
        return f"(its text can't be shown: {type(second).__name__})"
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: _LONGEST + 1])
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _places(error: BaseException) -> str:
    """Where an exception was raised, and the file from which that was called."""
    frames = [(f.f_code.co_filename, line) for f, line in traceback.walk_tb(error.__traceback__)]
    if not frames:
        return ""
    last, rest = frames[-1], [f for f in frames if not f[0].startswith(_CORE) and f[0] != contextlib.__file__]
    callers = [f for f in rest if f[0] != last[0]]
    text = f"{last[0]}:{last[1]}"
    return f" ({text}, called from {callers[-1][0]}:{callers[-1][1]})" if callers else f" ({text})"


def blame(error: BaseException) -> PluginError | None:
    """Return the failure of the plugin in whose code ``error`` was raised, for what no ``plugin_call`` surrounds.

    Returns:
        None when no plugin of another distribution was running, or it is no failure of a plugin: a bug of ours keeps
        its traceback.
    """
    if is_not_a_plugins(error):
        return None
    modules = [str(f.f_globals.get("__name__", "")) for f, _ in traceback.walk_tb(error.__traceback__)]
    owners = _owners() if modules else {}
    for module in reversed(modules):
        owner = owners.get(module.partition(".")[0])
        if owner is not None:
            failure = PluginError(f"plugin {owner} failed: {describe(error)}")
            failure.__cause__ = error
            return failure
    return None


def _owners() -> dict[str, str]:
    """Plugin and distribution by top-level module, of plugins that are not ours."""
    owners = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        distribution, version = identify(point.dist)
        if distribution != NAME:
            owners[point.module.partition(".")[0]] = f"{point.name!r} of {distribution} {version}"
    return owners
