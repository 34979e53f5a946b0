"""A simulated run with real logging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanochat_core import LoggerContext
from nanochat_core.loggers.progress import Progress, progress_file
from nanochat_core.loggers.run_log import Logs
from nanochat_core.plugins.choice import Choice, LoggerKeys
from nanochat_core.plugins.discovery import load_plugins
from nanochat_core.runs.directory import RunDirectory


class Run:
    """Ledger and one logger of a simulated run."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "runs" / "mine" / "1"
        self.directory.mkdir(parents=True)
        self.logs = Logs(RunDirectory(self.directory))

    def start(self, plugin: str = "moody", timeout: float = 300.0, start_step: int = 0, **options: Any) -> Run:
        entry = load_plugins()["logger"].get(plugin)
        assert entry is not None
        context = LoggerContext(self.directory, "mine", "1", "nanochat", "", (), {}, 10, start_step)
        self.logs.open()
        self.logs.open_ledger()
        choice = Choice(LoggerKeys(plugin, plugin, timeout), entry, entry.config(**options))
        self.logs.start_loggers((choice,), context)
        return self

    def train(self, *steps: int, evaluate: tuple[int, ...] = ()) -> Run:
        for step in steps:
            self.logs.record(step, {"train/loss": 1.0 / (step + 1)})
            if step + 1 in evaluate:
                self.logs.record(step + 1, {"evaluator": "bpb", "val/bpb": 2.0})
        return self

    def finish(self, status: Any = "finished") -> None:
        self.logs.finish(status)
        self.logs.close()

    @property
    def told(self) -> list[tuple[int, str]]:
        """Step and evaluator ("" for training steps) of the records that the logger received."""
        return [(line["step"], line.get("evaluator", "")) for line in self.lines if "step" in line]

    @property
    def lines(self) -> list[dict[str, Any]]:
        file = self.directory / "moody.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def said(self) -> list[str]:
        return (self.directory / "log.txt").read_text().splitlines()

    @property
    def progress(self) -> Progress:
        return Progress.read(progress_file(self.directory, "moody"))
