"""The interface of loggers. Imports no torch: a logger runs in a process of its own, which has no use for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import attrs

from nanochat_core.files import LEDGER, read_ledger

_NOT_FINITE = ("nan", "inf", "-inf")  # JSON has no such numbers, so the ledger writes words


def metrics_and_texts(record: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """What a line of the ledger says, by name: numbers, among them those that are not finite, and texts."""
    values = {name: value for name, value in record.items() if name not in ("step", "time", "evaluator")}
    texts = {name: value for name, value in values.items() if isinstance(value, str) and value not in _NOT_FINITE}
    metrics = {
        name: float(value) if isinstance(value, str) else value for name, value in values.items() if name not in texts
    }
    return metrics, texts


@attrs.frozen
class LoggerContext:
    """What a logger may know when it is built, once a run and only on rank 0.

    Args:
        directory: the run's directory.
        name: experiment name; ``id``: the run's id.
        project, group, tags: of ``[run]``.
        experiment: the resolved experiment as nested plain data.
        num_iterations: optimizer steps of the run.
        start_step: the first step it will be told of, or has to be told of again: 0, or where it or the run goes on.
        live: the run is being trained; False when ``nanochat log-sync`` sends a run that has ended.
        report: say a line to the person at the terminal (what is printed goes to ``loggers/<name>.log``).
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
        """Step, evaluator's entry, metric and value of all that evaluators have found since the run began."""
        return [
            (record["step"], record["evaluator"], name, value)
            for record in read_ledger(self.directory / LEDGER)
            if "evaluator" in record
            for name, value in metrics_and_texts(record)[0].items()
        ]


class Logger(ABC):
    """Mirrors the ledger, in a process of its own. What it raises, and how long it takes, never touches training.

    ``rewinds``: how a logger is told of a run that was resumed from an older checkpoint. False: it is never told of a
    step twice. True: it is told again of every step from ``context.start_step`` on, and replaces what it knew.
    """

    rewinds: ClassVar[bool] = False

    @abstractmethod
    def log(self, record: Mapping[str, float | str]) -> None:
        """One line of the ledger: ``step``, ``time`` (seconds since the epoch), and metrics or texts by name.

        What evaluators found carries their entry's name as ``evaluator``. A record that raises is told again later.
        """

    def finish(self, status: Literal["finished", "failed", "preempted"]) -> None:
        """The run ended. ``failed``: also when it was killed. The process ends at once when this returns, without what
        libraries do at exit, so flush and close here."""
