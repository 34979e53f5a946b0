"""The standard streams of a command: closed, full, or of an encoding that lacks characters, none of it ends a command
with a traceback."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import Any

FLAGS = {"stdin": (0, "r"), "stdout": (1, "w"), "stderr": (2, "w")}


class Stream(io.TextIOWrapper):
    """stdout or stderr. When it can't be written, as on a full disk, what follows is dropped, and ``lost`` is set.

    A pipe whose reader has ended raises BrokenPipeError, which ends the command, unless the command ``goes_on``.
    """

    lost = goes_on = False

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._lose(error)

    def drop(self) -> None:
        """Discard what is still buffered and what follows, so that Python does not fail when it flushes at exit."""
        with contextlib.suppress(OSError):
            descriptor = os.open(os.devnull, os.O_WRONLY)
            os.dup2(descriptor, self.fileno())
            os.close(descriptor)

    def _lose(self, error: OSError) -> None:
        is_pipe = isinstance(error, BrokenPipeError)
        if is_pipe and not self.goes_on:
            raise error
        self.drop()
        if not self.lost and self is sys.stdout and not is_pipe:
            print(f"stdout can't be written ({error.strerror}): the rest of it is dropped", file=sys.stderr)
        self.lost = True


def prepare_streams(*, goes_on: bool) -> None:
    """Make the standard streams of this process safe to print to. Streams that a caller has replaced stay.

    Args:
        goes_on: whether the command does its work also when nobody reads what it prints.
    """
    for name, (descriptor, mode) in FLAGS.items():
        stream: Any = getattr(sys, name)
        if stream is None:
            _open_null(descriptor)
            # Whoever prints, and whoever inherits the descriptor, finds something there.
            null = Path(os.devnull).open(mode, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            setattr(sys, name, null)
        elif type(stream) is io.TextIOWrapper and stream is getattr(sys, f"__{name}__") and mode == "w":
            line_buffering, encoding = stream.line_buffering, stream.encoding
            safe = Stream(stream.detach(), encoding=encoding, errors="backslashreplace", line_buffering=line_buffering)
            setattr(sys, name, safe)
            setattr(sys, f"__{name}__", safe)
        elif type(stream) is io.TextIOWrapper and stream is sys.__stdin__:
            with contextlib.suppress(io.UnsupportedOperation):  # a caller of ``main`` has read from it already
                stream.reconfigure(errors="replace")
        if isinstance(getattr(sys, name), Stream):
            getattr(sys, name).goes_on = goes_on or name == "stderr"


def _open_null(wanted: int) -> None:
    """Open the null device at a descriptor that was closed, so that no file of ours gets its number."""
    try:
        os.fstat(wanted)
    except OSError:
        descriptor = os.open(os.devnull, os.O_RDWR)
        os.dup2(descriptor, wanted)
        if descriptor != wanted:
            os.close(descriptor)


def finish_output() -> bool:
    """Write what is still buffered. Returns whether any of stdout was lost."""
    sys.stdout.flush()
    return isinstance(sys.stdout, Stream) and sys.stdout.lost


def drop_output() -> None:
    """Discard what is still buffered for stdout."""
    if isinstance(sys.stdout, Stream):
        sys.stdout.drop()
