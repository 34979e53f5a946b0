"""The job of a logger's process, and its progress."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import attrs

from nanochat_core.files import read_json
from nanochat_core.interfaces.logger import LoggerContext
from nanochat_core.plugins.choice import Choice
from nanochat_core.runs.directory import RunDirectory


@attrs.frozen
class Job:
    """The job of one logger worker.

    Args:
        timeout: seconds that building the logger, one record, and sending the rest at the end may take each.
        finish_at_once: whether sending the rest at the end of the run is one task of ``timeout`` seconds, or each
            record is one.
    """

    choice: Choice
    context: LoggerContext
    timeout: float
    finish_at_once: bool = True


@attrs.define
class Progress:
    """The progress of a logger, as kept in ``loggers/<name>.json``.

    Args:
        offset: bytes of the ledger that it has received; ``last_line``: digest of the line that ends there.
        steps: last step that it has received, by stream: "" for training steps, else the evaluator's entry.
        failures: number of exceptions it raised.
        status: of the run, once the logger has it; "" before.
    """

    offset: int = 0
    last_line: str = ""
    steps: dict[str, int] = attrs.field(factory=dict)
    failures: int = 0
    status: str = ""

    @classmethod
    def read(cls, path: Path) -> Progress:
        """Read the file; without one, return the progress of a new logger."""
        try:
            content = read_json(path)
        except (OSError, ValueError):
            return cls()
        kinds = {field.name: type(getattr(cls(), field.name)) for field in attrs.fields(cls)}
        steps = content.get("steps", {})
        if any(type(value) is not kinds.get(name) for name, value in content.items()):
            return cls()
        if not all(type(step) is int for step in steps.values()) or not 0 <= content.get("offset", 0) < 2**63:
            return cls()
        return cls(**content)

    def write(self, path: Path) -> None:
        """Overwrite the file in one call: it is written at every record, and renaming a file each time would be
        slow."""
        text = json.dumps(attrs.asdict(self, recurse=False))
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            os.write(descriptor, text.ljust(max(size - 1, 0)).encode() + b"\n")
        finally:
            os.close(descriptor)

    def already_told(self, record: dict[str, Any]) -> bool:
        return record["step"] <= self.steps.get(record.get("evaluator", ""), -1)

    def note(self, record: dict[str, Any]) -> None:
        self.steps[record.get("evaluator", "")] = record["step"]


def progress_file(directory: Path, name: str) -> Path:
    """The file with the progress of logger ``name`` of the run in ``directory``."""
    return RunDirectory(directory).loggers / f"{name}.json"
