"""The logger ``csv``: tables in long form, one line per metric and step, so that new metrics need no new columns."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from nanochat_core import Logger, LoggerContext, metrics_and_texts
from nanochat_csv.config import CSVConfig

_HEADER = ("step", "time", "name", "value")


class CSV(Logger):
    """A logger that writes ``metrics.csv`` and ``texts.csv``, with the columns step, time (seconds since the epoch),
    name and value, and ``run.json``, which describes the run and has its status."""

    rewinds: ClassVar[bool] = True

    def __init__(self, config: CSVConfig, context: LoggerContext) -> None:
        self.directory = context.directory / "csv"
        if config.directory is not None:
            self.directory = config.directory / context.name / context.id
        self.directory.mkdir(parents=True, exist_ok=True)
        self.about = {
            "name": context.name,
            "id": context.id,
            "project": context.project,
            "group": context.group,
            "tags": list(context.tags),
            "experiment": context.experiment,
        }
        self._write_about("running")
        self.metrics, self.texts = (
            _rewound(self.directory / name, context.start_step).open("a", newline="", encoding="utf-8")
            for name in ("metrics.csv", "texts.csv")
        )

    def log(self, record: Mapping[str, float | str]) -> None:
        metrics, texts = metrics_and_texts(record)
        start = (record["step"], record["time"])
        csv.writer(self.metrics).writerows((*start, *item) for item in metrics.items())
        csv.writer(self.texts).writerows((*start, *item) for item in texts.items())
        self.metrics.flush()
        self.texts.flush()

    def finish(self, status: Literal["finished", "failed", "preempted"]) -> None:
        self.metrics.close()
        self.texts.close()
        self._write_about(status)

    def _write_about(self, status: str) -> None:
        text = json.dumps({**self.about, "status": status}, indent=1, default=str)
        (self.directory / "run.json").write_text(text + "\n", encoding="utf-8")


def _rewound(path: Path, start_step: int) -> Path:
    """Remove the steps from ``start_step`` on, and a last line that was cut short, from a file. Returns its path."""
    rows: list[list[str]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if len(row) == 4 and row[0].isdigit() and int(row[0]) < start_step]
    new = path.with_suffix(".new")
    with new.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([_HEADER, *rows])
    return new.replace(path)  # atomic: a process that is killed before it keeps the old file
