"""The Logger interface. This module imports no torch, since a logger runs in a process of its own without it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import attrs

from nanochat_core.files import LEDGER, read_ledger

_NOT_FINITE = ("nan", "inf", "-inf")  # JSON has no such numbers, so the ledger has strings instead


def metrics_and_texts(record: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """Split a record of the ledger into metrics by name, those that are not finite included, and texts by name."""
    values = {name: value for name, value in record.items() if name not in ("step", "time", "evaluator")}
    texts = {name: value for name, value in values.items() if isinstance(value, str) and value not in _NOT_FINITE}
    metrics = {
        name: float(value) if isinstance(value, str) else value for name, value in values.items() if name not in texts
    }
    return metrics, texts


@attrs.frozen
class RunLabels:
    """What a run is called, for the check of a logger before it: ``name``, and the options of ``[run]``."""

    name: str
    project: str
    group: str
    tags: tuple[str, ...]


@attrs.frozen
class LoggerContext:
    """The context that the factory of a logger receives, once per run and only on rank 0.

    Args:
        directory: the run's directory.
        name: the name of the experiment; ``id``: the id of the run.
        project, group, tags: the options of ``[run]``.
        experiment: the resolved experiment as nested plain data.
        num_iterations: optimizer steps of the run.
        start_step: the first step whose records the logger receives, some perhaps again: 0 for a new run, otherwise the
            step from which the logger or the run continues.
        live: whether the run is being trained; False when ``nanochat log-sync`` sends a run that has ended.
        report: prints a line on the user's terminal (standard output of a logger goes to ``loggers/<name>.log``).
    """

    directory: Path
    name: str
    id: str
    project: str
    group: str
    tags: tuple[str, ...]
    experiment: Mapping[str, Any]
    num_iterations: int
    start_step: int
    live: bool = True
    report: Callable[[str], None] = print

    def evaluations(self) -> list[tuple[int, str, str, float]]:
        """Return (step, evaluator's entry, metric, value) of all results of evaluators since the run began."""
        return [
            (record["step"], record["evaluator"], name, value)
            for record in read_ledger(self.directory / LEDGER)
            if "evaluator" in record
            for name, value in metrics_and_texts(record)[0].items()
        ]


class Logger(ABC):
    """A copy of the ledger in another place, written by a process of its own, so that training is not affected by its
    errors and delays.

    ``rewinds`` selects the records that a logger receives of a run that is resumed from an older checkpoint. False: it
    never receives a step twice. True: it receives every step from ``context.start_step`` on again, and replaces the
    records that it had.
    """

    rewinds: ClassVar[bool] = False

    @abstractmethod
    def log(self, record: Mapping[str, float | str]) -> None:
        """Log a record of the ledger: ``step``, ``time`` (seconds since the epoch), and metrics or texts by name.

        A record of an evaluator has the name of its entry as ``evaluator``. When this raises, the record is sent again
        later.
        """

    def finish(self, status: Literal["finished", "failed", "preempted"]) -> None:
        """Finish the log of a run that has ended; ``failed`` includes a run that was killed.

        When this returns, the process ends at once, without the exit handlers of libraries: flush and close here.
        """
