"""The training process's side of a logger: it starts the logger's process, polls it and ends it, and never waits for
it."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable

import attrs

from nanochat_core.distributed.environment import python_command, python_environment
from nanochat_core.loggers.progress import Job, Progress, progress_file
from nanochat_core.loggers.worker import CANT_START, INCOMPLETE
from nanochat_core.runs.directory import RunDirectory
from nanochat_core.runs.ledger import read_ledger

_DOING = {"start": "to start", "log": "over one record", "finish": "to send the rest and finish"}


@attrs.define
class LoggerProcess:
    """A running logger.

    Args:
        report: prints and logs a line.
    """

    job: Job
    report: Callable[[str], None]
    _process: subprocess.Popen[bytes] = attrs.field(init=False)
    _control: int = attrs.field(init=False)
    _messages: int = attrs.field(init=False)
    _buffer: bytes = attrs.field(default=b"", init=False)
    _phase: str = attrs.field(default="start", init=False)
    _overdue: bool = attrs.field(default=False, init=False)  # killed here, because it had not ended in time

    def __attrs_post_init__(self) -> None:
        job = self.job
        progress = progress_file(job.context.directory, self.name)
        progress.parent.mkdir(exist_ok=True)
        their_control, self._control = os.pipe()
        self._messages, their_messages = os.pipe()
        os.set_blocking(self._messages, False)
        with progress.with_suffix(".log").open("ab") as log, tempfile.TemporaryFile() as stdin:
            pickle.dump(job, stdin)
            stdin.seek(0)
            numbers = map(str, (their_control, their_messages, os.getpid()))
            try:
                self._process = subprocess.Popen(
                    python_command("nanochat_core.loggers.worker", *numbers),
                    stdin=stdin,
                    stdout=log,
                    stderr=log,
                    pass_fds=(their_control, their_messages),
                    process_group=0,  # a Ctrl-C does not reach it, and it is killed with its children
                    env=python_environment({}),
                )
            finally:
                os.close(their_control)
                os.close(their_messages)

    @property
    def name(self) -> str:
        return self.job.choice.name

    @property
    def pid(self) -> int:
        return self._process.pid

    def look(self) -> bool:
        """Report its messages. Returns whether it runs. Takes microseconds."""
        self._read_messages()
        if self._process.poll() is None:
            return True
        self._read_messages()
        self.kill()
        code = self._process.returncode
        if code not in (0, INCOMPLETE, CANT_START):  # it reports those itself; the watchdog exits with 1
            phase = "finish" if self._overdue else self._phase
            late = f"took longer than {self.job.timeout:g} s {_DOING[phase]}"
            how = late if code == 1 or self._overdue else f"died ({code})"
            self.report(f"logger {self.name} {how} and is ended; see {self._relative('.log')}")
        self._account(complete=code == 0)
        os.close(self._control)
        os.close(self._messages)
        return False

    def end(self, status: str) -> None:
        """Pass it the status of the run. From now on it has the entry's ``timeout`` to send the rest."""
        with contextlib.suppress(OSError):
            os.write(self._control, f"{status}\n".encode())

    def wait(self, deadline: float | None) -> bool:
        """Wait until it has ended; kill it at ``deadline`` (of ``time.monotonic``). Returns whether it sent every
        record."""
        while self.look():
            if deadline is not None and time.monotonic() > deadline:
                self._overdue = True
                self.kill()
            else:
                time.sleep(0.02)
        return self._process.returncode == 0

    def kill(self) -> None:
        """Kill it and its children."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _read_messages(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            while data := os.read(self._messages, 65536):
                self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            message = json.loads(line)
            self._phase = message.get("phase", self._phase)
            if "report" in message:
                self.report(f"logger {self.name}: {message['report']}")

    def _account(self, complete: bool) -> None:
        """Report the records that a logger which has ended did not receive."""
        context = self.job.context
        progress = Progress.read(progress_file(context.directory, self.name))
        if complete and not progress.failures:
            return
        run = RunDirectory(context.directory)
        missed = sum(not progress.already_told(record) for record in read_ledger(run.ledger))
        failures = f"failed {progress.failures} times" if progress.failures else "ended"
        if complete:
            self.report(f"logger {self.name} {failures} and recovered: it has every record")
        elif self.name.startswith("observer-"):
            self.report(f"{self.name} {failures}, it did not receive {missed} records")
        else:
            self.report(
                f"logger {self.name} {failures}, it has missed {missed} records so far; send them when the run has "
                f"ended: nanochat log-sync {run.name}/{run.id} --to {self.name}"
            )

    def _relative(self, suffix: str) -> str:
        return str(progress_file(self.job.context.directory, self.name).with_suffix(suffix))
