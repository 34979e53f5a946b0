"""The ledger ``metrics.jsonl``: one flat JSON object per line, always written, the source of truth about a run. Imports
no torch."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanochat_core.files import ledger_record, open_atomic, require_regular
from nanochat_core.files import read_ledger as read_ledger  # loggers' contexts, below this room, read ledgers too


class Ledger:
    """A writer that appends records to a ledger, each at once. Records that can't be written, such as on a full disk,
    are kept and written before the next one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab+", buffering=0)
        self._unwritten = b""
        self.problem = ""  # why lines could not be written so far

    def write(self, step: int, values: Mapping[str, float | str]) -> dict[str, Any]:
        """Append one line and return the record. Values that are not finite become the strings "nan", "inf", "-inf"."""
        clean = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        record = {"step": step, "time": time.time(), **clean}
        self._unwritten += json.dumps(record, ensure_ascii=False).encode() + b"\n"
        self._write()
        return record

    def _write(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
            self.problem = ""
        except OSError as error:
            self.problem = str(error)

    @property
    def bytes(self) -> int:
        """Length of the ledger in bytes, with lines that are still to be written."""
        return self._file.tell() + len(self._unwritten)

    def keep_at(self, path: Path) -> bool:
        """Write the ledger anew at ``path``, and go on there, if that is not the file that is being written: somebody
        has removed or replaced it, or the run goes on in another directory. A file that is in its place is kept under
        another name. Returns whether that was necessary.

        Raises:
            OSError: when it can't be written there.
        """
        ours = os.fstat(self._file.fileno())
        try:
            if os.path.samestat(path.stat(), ours):
                self.path = path
                return False
            path.rename(path.with_name(f"{path.stem}.replaced-{time.time_ns()}{path.suffix}"))
        except FileNotFoundError:
            pass
        self._file.seek(0)
        with open_atomic(path) as file:
            shutil.copyfileobj(self._file, file)
        self._file.close()
        self.path, self._file = path, path.open("ab+", buffering=0)
        self._file.seek(0, os.SEEK_END)
        self._write()
        return True

    def close(self) -> None:
        """Try once more to write everything, and close the file. ``problem`` is not empty if lines are lost."""
        self._write()
        self._file.close()


def best_value(path: Path, metric: str, best_is: str, from_step: int = 0) -> float | None:
    """The best value of a metric in the ledger at ``path``, None if it never was a number.

    Args:
        best_is: "smallest" or "largest".
        from_step: earlier steps don't count, as they were evaluated on other data.
    """
    found = {}
    for record in read_ledger(path):
        value = record.get(metric)
        if isinstance(value, int | float) and not isinstance(value, bool) and record["step"] >= from_step:
            found[record["step"]] = value  # of a step that was evaluated again, the last value counts
    return (max if best_is == "largest" else min)(found.values(), default=None)


def rewind_ledger(path: Path, keep_bytes: int, step: int) -> list[dict[str, Any]]:
    """Remove what a run wrote after the checkpoint of ``step``, at which the ledger had ``keep_bytes``.

    Lines of steps that a resume repeats are moved to ``metrics.rewound.jsonl``; evaluations of ``step`` itself stay,
    also those made after the checkpoint. Returns their records. A process killed at any moment in here can repeat it.
    """
    path.touch()  # it may have been removed
    require_regular(path)
    with path.open("rb+") as file:
        keep_bytes = min(keep_bytes, file.seek(0, os.SEEK_END))
        file.seek(max(keep_bytes - 1, 0))
        if keep_bytes and file.read(1) != b"\n":  # a power cut took its end, or it was changed: from a whole line on
            file.seek(0)
            keep_bytes = file.read(keep_bytes).rfind(b"\n") + 1
        file.seek(keep_bytes)
        kept: list[bytes] = []
        rewound: list[bytes] = []
        for line in file:
            record = ledger_record(line)
            if record is not None:  # otherwise it was cut short by a crash
                stays = "evaluator" in record and record["step"] == step
                (kept if stays else rewound).append(line)
        if file.tell() > keep_bytes + sum(map(len, kept)):
            if rewound:
                _append_new(path.with_name("metrics.rewound.jsonl"), rewound)
            file.seek(keep_bytes)
            file.truncate()  # if killed here, the evaluations are repeated
            file.writelines(kept)
        file.seek(0)
        beginning = b'{"step": %d,' % step  # as write() writes it
        own = [ledger_record(line) for line in file if line.startswith(beginning)]
    return [record for record in own if record is not None and "evaluator" in record]


def _append_new(path: Path, lines: list[bytes]) -> None:
    """Append ``lines``, except those that a process appended before it was killed."""
    with path.open("ab+") as file:
        file.seek(0)
        there = file.read()
        whole = there[: there.rfind(b"\n") + 1]
        last = whole.splitlines(keepends=True)[-1:]  # no two lines have the same time
        known = lines.index(last[0]) + 1 if last and last[0] in lines else 0
        file.truncate(len(whole))
        file.writelines(lines[known:])
