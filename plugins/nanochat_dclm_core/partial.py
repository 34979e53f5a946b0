"""Results of finished tasks, kept on disk until all tasks are done, so that an interruption costs at most one task."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from nanochat_core import Model

FILE = "core_partial.jsonl"
SAMPLES = 256  # elements of each parameter that are hashed


class PartialResults:
    """A file with one line of facts that the results depend on, and one line per finished task; for rank 0 only.

    Args:
        directory: directory of the file; None keeps nothing.
        facts: results are used again only while these are equal.
    """

    def __init__(self, directory: Path | None, facts: dict[str, Any]) -> None:
        self._file = directory / FILE if directory is not None else None
        self._facts = json.dumps(facts, sort_keys=True)

    def read(self) -> dict[str, list[dict[str, Any]]]:
        """Rows by task. A file with different facts is removed."""
        if self._file is None or not self._file.is_file():
            return {}
        rows = {}
        try:
            lines = self._file.read_text(encoding="utf-8").split("\n")
            for line in lines[1:-1]:  # the text after the last newline is empty, or was cut off
                task = json.loads(line)
                rows[task["task"]] = task["rows"]
        except (ValueError, LookupError, TypeError, RecursionError):  # damaged
            lines = [""]
        if lines[0] != self._facts:
            self._file.unlink()
            return {}
        if lines[-1]:
            self._file.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
        return rows

    def write(self, task: str, rows: list[dict[str, Any]]) -> None:
        if self._file is None:
            return
        if not self._file.exists():
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(self._facts + "\n", encoding="utf-8")
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"task": task, "rows": rows}) + "\n")

    def remove(self) -> None:
        if self._file is not None:
            self._file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # absent, or not empty
                self._file.parent.rmdir()


def weights_digest(model: Model) -> str:
    """Hash of some elements of every parameter. (A training step changes all of them.)"""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, len(flat) // SAMPLES)].to(torch.float32).cpu().numpy()
        digest.update(name.encode() + some.tobytes())
    return digest.hexdigest()
