"""The program of one logger: ``python -m nanochat_core.loggers.worker``, started by ``process.py``. Imports no torch.

It builds the logger, passes it every new line of the ledger, and records its progress in ``loggers/<name>.json``. Two
pipes connect it with the training process; neither process waits for the other:

- one brings a line when the run ends, or closes when the training process dies, which ends the run as failed;
- the other carries messages to print.

A watchdog, which works even when Python itself is stuck, ends the process when the logger takes longer than the entry's
``timeout``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import json
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import attrs

from nanochat_core.errors import NanochatError, PluginError
from nanochat_core.files import ledger_record, lock_file
from nanochat_core.interfaces.logger import Logger
from nanochat_core.loggers.priority import lower_priority
from nanochat_core.loggers.progress import Job, Progress, progress_file
from nanochat_core.runs.directory import RunDirectory

if TYPE_CHECKING:
    from filelock import AcquireReturnProxy

POLL_SECONDS = 1.0  # seconds between reads of the ledger; new records are passed on together, which costs least
LONGEST_PAUSE = 60.0  # seconds between attempts at a record on which the logger raises
INCOMPLETE, CANT_START = 3, 4  # exit codes


class LoggerWorker:
    """Reads a ledger and passes its records to a logger.

    Args:
        say: sends a message to the training process: ``say(report="...")``, ``say(phase="...")``.
    """

    def __init__(self, job: Job, say: Any) -> None:
        self.job, self.say = job, say
        self.ledger = RunDirectory(job.context.directory).ledger
        self.progress_file = progress_file(job.context.directory, job.choice.name)
        self.progress = Progress.read(self.progress_file)
        self.known = bool(self.progress.steps)
        self.failure_reported = False
        self.logger: Logger

    def start(self) -> None:
        """Build the logger, and find the record to continue from.

        Raises:
            Exception: whatever the logger raises.
        """
        start_step = 0
        if self.known:
            start_step = min(self.job.context.start_step, max(self.progress.steps.values()))
        context = attrs.evolve(self.job.context, start_step=start_step, report=lambda line: self.say(report=line))
        with self._watched("start"):
            self.logger = self.job.choice.build(context)
        if not isinstance(self.logger, Logger):
            raise PluginError("its factory must return a nanochat_core.Logger")
        if self.logger.rewinds:
            self.progress.steps = {name: min(step, start_step - 1) for name, step in self.progress.steps.items()}
            self.progress.offset = 0
        elif not self._ledger_is_as_it_was():
            self.progress.offset = 0  # rewound: read all of it, and leave out the steps that the logger has

    def _ledger_is_as_it_was(self) -> bool:
        """Whether the ledger still has the last line passed on, just before the offset."""
        offset = self.progress.offset
        if not self.known:
            return offset == 0
        try:
            with self.ledger.open("rb") as file:
                start = max(0, offset - 2**20)
                file.seek(start)
                before = file.read(offset - start)
        except OSError:
            return False
        lines = before.splitlines(keepends=True)
        return len(before) == offset - start and bool(lines) and _digest(lines[-1]) == self.progress.last_line

    def send_new(self) -> None:
        """Pass on the new records of the ledger.

        Raises:
            Exception: what the logger raised on a record; the next call passes that record again.
        """
        self._armed = 0.0
        with self._watched("log"):
            for line in self._new_lines():
                if self._watching == "log":  # each record has its own time
                    self._arm()
                self._tell(line)

    def _tell(self, line: bytes) -> None:
        record = ledger_record(line)
        if record is not None and not self.progress.already_told(record):  # a damaged line is passed over
            try:
                self.logger.log(record)
            except Exception as error:
                self._failed(f"failed at step {record['step']}, training continues: {type(error).__name__}: {error}")
                raise
            self.progress.note(record)
        self.progress.offset += len(line)
        self.progress.last_line = _digest(line)
        self.progress.write(
            self.progress_file
        )  # at once: a record that was not noted when the process is killed would be passed twice

    def _new_lines(self) -> Iterator[bytes]:
        """Whole lines from the offset to the current end of the ledger."""
        with contextlib.suppress(FileNotFoundError), self.ledger.open("rb") as file:
            end = os.fstat(file.fileno()).st_size  # later lines wait for the next read
            file.seek(self.progress.offset)
            while file.tell() < end:
                line = file.readline()
                if not line.endswith(b"\n"):
                    return
                yield line

    def finish(self, status: str) -> None:
        """Pass on the remaining records and the status of the run.

        Raises:
            Exception: what the logger raised.
        """
        with self._watched("finish") if self.job.finish_at_once else contextlib.nullcontext():
            self.send_new()
            try:
                with contextlib.nullcontext() if self.job.finish_at_once else self._watched("finish"):
                    self.logger.finish(status)  # type: ignore[arg-type]
            except Exception as error:
                self._failed(f"failed to finish: {type(error).__name__}: {error}")
                raise
        self.progress.status = status
        self.progress.write(self.progress_file)

    def _failed(self, what: str) -> None:
        """Count a failure, and report the first."""
        traceback.print_exc()
        self.progress.failures += 1
        self.progress.write(self.progress_file)
        if not self.failure_reported:
            self.say(report=what)
        self.failure_reported = True

    _watching = ""
    _armed = 0.0  # when the watchdog began to count

    @contextlib.contextmanager
    def _watched(self, phase: str) -> Iterator[None]:
        """End this process if it takes longer than the timeout. An outer watch has precedence."""
        if self._watching:
            yield
            return
        self._watching = phase
        self.say(phase=phase)
        self._arm()
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            self._watching = ""

    def _arm(self) -> None:
        """Restart the watchdog's clock, unless that was done a moment ago, as it starts a thread."""
        now = time.monotonic()
        if now > self._armed + self.job.timeout / 20 or self._watching != "log":
            faulthandler.dump_traceback_later(self.job.timeout, exit=True, file=sys.stderr)
            self._armed = now


def _digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()[:16]


class _Ended(threading.Thread):
    """A thread that waits for the end of the run: a status through the pipe, or the end of the pipe when the training
    process has died."""

    def __init__(self, pipe: IO[bytes], parent: int) -> None:
        super().__init__(daemon=True)
        self.pipe, self.event, self.status, self.parent = pipe, threading.Event(), "failed", parent
        self.start()

    def run(self) -> None:
        self.status = self.pipe.readline().decode().strip() or "failed"
        self.event.set()

    def wait(self, seconds: float) -> bool:
        """Whether the run has ended, after at most ``seconds``. A process that the training process forked may
        hold the pipe open after its death, but can't be this one's parent."""
        return self.event.wait(seconds) or os.getppid() != self.parent


def _follow(worker: LoggerWorker, ended: _Ended) -> bool:
    """Follow the ledger to the end of the run. Returns whether the logger got every record."""
    pause = POLL_SECONDS
    while not ended.wait(pause):
        try:
            worker.send_new()
            pause = POLL_SECONDS
        except Exception:
            pause = min(max(1.0, 2 * pause), LONGEST_PAUSE)
    if worker.job.context.live:
        lower_priority(False)
    try:
        worker.finish(ended.status)
    except Exception:
        return False
    return True


class _Speaker:
    """Messages to the training process, one JSON object per line. It may have died."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self.pipe, self.last = pipe, ""
        os.set_blocking(pipe.fileno(), False)

    def __call__(self, **message: str) -> None:
        text = json.dumps(message)
        if text != self.last:  # a phase is sent only when it changes
            self.last = text
            with contextlib.suppress(OSError):
                os.write(self.pipe.fileno(), text.encode() + b"\n")


def main() -> int:
    """Run the worker. The job is read from stdin; arguments are the file descriptors of the pipes and the parent's
    process id. Output goes to the logger's log."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU):
        signal.signal(number, signal.SIG_IGN)  # meant for the training process, which will report how the run ended
    for number in (signal.SIGTTIN, signal.SIGTTOU):
        signal.signal(
            number, signal.SIG_IGN
        )  # a library that reads from the terminal gets an error instead of being stopped
    control, messages, parent = map(int, sys.argv[1:])
    ended = _Ended(os.fdopen(control, "rb"), parent)
    say = _Speaker(os.fdopen(messages, "wb", buffering=0))
    try:
        job: Job = pickle.load(sys.stdin.buffer)  # from our own parent, through a file without a name
        print(f"-- {time.strftime('%Y-%m-%d %H:%M:%S')} logger {job.choice.name}, process {os.getpid()}", flush=True)
        lock = _lock(progress_file(job.context.directory, job.choice.name).with_suffix(".lock"), job.timeout)
        if job.context.live:
            os.nice(10)
        worker = LoggerWorker(job, say)
        worker.start()
    except Exception as error:
        traceback.print_exc()
        reason = str(error).splitlines()[0] if isinstance(error, NanochatError) else repr(error)
        say(report=f"can't start, training continues without it: {reason}")
        return CANT_START
    if job.context.live:
        lower_priority()
    with lock:
        return 0 if _follow(worker, ended) else INCOMPLETE


def _lock(path: Path, timeout: float) -> AcquireReturnProxy:
    """Take the lock of the logger: the worker of a training process that has just died may still be sending."""
    try:
        return lock_file(path, timeout)
    except TimeoutError:
        raise PluginError(f"another process has been sending to it for {timeout:g} s") from None


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what a library does at exit may hang, and a logger that has finished has nothing left to do
