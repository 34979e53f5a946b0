"""Terminal output, ``log.txt``, the ledger, and the loggers that mirror it. Ranks other than 0 only have a log file of
their own."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
import traceback
from typing import IO, Literal

import attrs
from tqdm import tqdm

from nanochat_core.errors import CheckpointError, PluginError
from nanochat_core.interfaces.logger import Logger, LoggerContext
from nanochat_core.loggers.process import LoggerProcess
from nanochat_core.loggers.progress import Job
from nanochat_core.plugins.choice import Choice, LoggerKeys
from nanochat_core.runs.directory import RunDirectory
from nanochat_core.runs.ledger import Ledger

LOOK_SECONDS = 0.2  # seconds between polls of the loggers' processes; a poll takes microseconds
GRACE_SECONDS = 10.0  # a logger's process ends itself at its timeout, and says where it was; after that it is killed

Status = Literal["finished", "failed", "preempted"]


@attrs.define
class Logs:
    """The outputs of a run. Nothing is written before ``open`` or ``open_rank``."""

    run_dir: RunDirectory
    began: bool = attrs.field(default=False, init=False)  # whether the run has ever opened its ledger
    _text: IO[str] | None = attrs.field(default=None, init=False)
    _prints: bool = attrs.field(default=False, init=False)  # to the terminal
    _ledger: Ledger | None = attrs.field(default=None, init=False)
    _loggers: list[tuple[Choice, Logger]] = attrs.field(factory=list, init=False)  # in this process
    _processes: list[LoggerProcess] = attrs.field(factory=list, init=False)
    _looked: float = attrs.field(default=0.0, init=False)  # when the processes were last polled

    def open(self) -> None:
        """Open the log of rank 0, which also prints to the terminal."""
        self._prints = True
        try:
            self._text = self.run_dir.log.open("a", encoding="utf-8")
        except OSError as error:
            self.report(f"{self.run_dir.log} can't be written, the run continues without it: {error.strerror}")

    def open_rank(self, rank: int) -> IO[str]:
        """Open the log of another rank: from now on everything that this process prints, libraries included, goes
        there.

        Returns:
            The stderr before.
        """
        terminal = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace")
        file = self.run_dir.rank_log(rank)
        with contextlib.suppress(OSError):  # rank 0 has failed and removed the directory
            file.parent.mkdir(exist_ok=True)
            self._text = file.open("a", encoding="utf-8")
            for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
                stream.flush()
                os.dup2(self._text.fileno(), number)
            self.note(
                f"-- rank {rank}, process {os.getpid()} on {platform.node()}, {time.strftime('%Y-%m-%d %H:%M:%S')}"
            )
        return terminal

    def open_ledger(self) -> None:
        """Open the ledger: from now on the run's directory is never deleted.

        Raises:
            CheckpointError: when the directory can't be written.
        """
        self.run_dir.begin()
        self.began = True
        try:
            self._ledger = Ledger(self.run_dir.ledger)
        except OSError as error:
            raise CheckpointError(f"{self.run_dir.ledger} can't be written ({error.strerror}): move it away") from error

    def keep_ledger(self) -> None:
        """Write the ledger anew if somebody has removed or replaced it. That, or a failure of it, is reported."""
        if self._ledger is None:
            return
        try:
            if self._ledger.keep_at(self.run_dir.ledger):
                self.report(
                    f"{self.run_dir.ledger} was removed or replaced while the run writes it: it is written anew"
                )
        except OSError as error:
            self.report(f"{self.run_dir.ledger} was removed or replaced, and can't be written anew: {error}")

    def move(self, run_dir: RunDirectory) -> None:
        """Go on in another directory: the run's own, which was moved, or one in its place."""
        self.run_dir = run_dir
        self.keep_ledger()
        if self._text is not None and not run_dir.log.exists():
            with contextlib.suppress(OSError):
                text = run_dir.log.open("a", encoding="utf-8")
                self._text.close()
                self._text = text

    @property
    def has_ledger(self) -> bool:
        return self._ledger is not None

    def start_loggers(self, choices: tuple[Choice, ...], context: LoggerContext) -> None:
        """Start the experiment's loggers, each in a process of its own unless its entry says otherwise.

        One that raises is reported, and the run continues without it.
        """
        for choice in choices:
            try:
                if not (choice.entry and choice.entry.in_process):
                    assert isinstance(choice.keys, LoggerKeys)
                    self._processes.append(LoggerProcess(Job(choice, context, choice.keys.timeout), self.report))
                    continue
                logger = choice.build(context)
                if not isinstance(logger, Logger):
                    raise PluginError("its factory must return a nanochat_core.Logger")
                self._loggers.append((choice, logger))
            except Exception as error:
                self.report(f"logger {choice.name} can't start, the run continues without it: {error}")

    def report(self, line: str) -> None:
        """Print a line to stdout and ``log.txt``; on other ranks, to their log."""
        if self._prints:
            with contextlib.suppress(OSError):  # the terminal or the reader of the pipe is gone: no reason to stop
                tqdm.write(line)  # goes around a progress bar
                sys.stdout.flush()
        self.note(line)

    def note(self, line: str) -> None:
        """Write a line to the log only."""
        if self._text is not None:
            with contextlib.suppress(OSError):  # a full disk
                print(line, file=self._text, flush=True)

    def record(self, step: int, values: dict[str, float | str]) -> None:
        """Append a record to the ledger. A logger in this process that raises is reported once and not called again;
        loggers in processes of their own read the ledger, and are only polled here."""
        if self._ledger is None:
            return
        before = self._ledger.problem
        record = self._ledger.write(step, values)
        if bool(before) != bool(self._ledger.problem):
            self.report(
                f"the ledger can be written again, and no line is lost (step {step})"
                if before
                else f"the ledger can't be written from step {step} on, lines are kept until it can: "
                f"{self._ledger.problem}"
            )
        for choice, logger in list(self._loggers):
            try:
                logger.log(record)
            except Exception as error:
                self._loggers.remove((choice, logger))
                self.report(f"logger {choice.name} failed at step {step}, the run continues without it: {error!r}")
                self.note(traceback.format_exc())
        now = time.monotonic()
        if self._processes and now > self._looked + LOOK_SECONDS:
            self._looked = now
            self._processes = [process for process in self._processes if process.look()]

    def status(self, status: str, step: int, num_iterations: int) -> None:
        """Write ``status.json``; a failure to write it is reported."""
        try:
            self.run_dir.write_status(status, step, num_iterations)
        except OSError as error:
            self.report(f"status.json can't be written, the run continues: {error}")

    def ledger_bytes(self) -> int:
        return self._ledger.bytes if self._ledger is not None else 0

    def finish(self, status: Status) -> None:
        """Close the ledger, and pass the status of the run to the loggers; each has its ``timeout`` to finish."""
        if self._ledger is not None:
            self.keep_ledger()
            self._ledger.close()
            if self._ledger.problem:
                self.report(f"the ledger lacks its last lines: {self._ledger.problem}")
            self._ledger = None
        for process in self._processes:
            process.end(status)
        for choice, logger in self._loggers:
            try:
                logger.finish(status)
            except Exception as error:
                self.report(f"logger {choice.name} failed to finish: {error!r}")
        self._loggers.clear()
        started = time.monotonic()
        for process in self._processes:
            process.wait(started + process.job.timeout + GRACE_SECONDS)
        self._processes.clear()

    def close(self) -> None:
        if self._text is not None:
            self._text.close()
            self._text, self._prints = None, False
