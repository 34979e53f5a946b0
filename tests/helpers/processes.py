"""Runs in separate processes, which tests signal, stop and kill."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

SECONDS = 300  # that a process may take; the machine may be busy with other things


class Process:
    """A command in its own session. As a context manager, it is killed at the end of the block.

    Args:
        command: program and arguments.
        site: a directory with packages, which is added to its PYTHONPATH.
        env: additional environment variables.
    """

    def __init__(
        self, command: Sequence[object], site: Path | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        environment = {**os.environ, **(env or {})}
        if site is not None:
            environment["PYTHONPATH"] = f"{site}{os.pathsep}{environment.get('PYTHONPATH', '')}"
        self.process = subprocess.Popen(
            [str(word) for word in command], env=environment, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    @classmethod
    def run(cls, *arguments: object, site: Path | None = None, env: Mapping[str, str] | None = None) -> Process:
        """Start ``nanochat run ARGUMENTS``."""
        return cls([sys.executable, "-m", "nanochat_core", "run", *arguments], site, env)

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()

    def wait_for(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + SECONDS
        while not condition():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end, "the condition did not become true in time"
            time.sleep(0.02)

    def end(self, timeout: float = SECONDS) -> tuple[int, str, str]:
        """Exit code, stdout, stderr; once all that have them open are gone too."""
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err

    def workers(self) -> list[int]:
        """Pids of its child processes, sorted. Needs /proc."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == self.process.pid:
                found.append(int(path.parent.name))
        return sorted(found)
