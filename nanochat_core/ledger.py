"""The ledger ``metrics.jsonl``: one flat JSON object a line, always written, the truth about a run. No torch."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class Ledger:
    """Appends records to a ledger, flushed line by line."""

    def __init__(self, path: Path, keep_bytes: int | None = None) -> None:
        """Open for appending. With ``keep_bytes`` what lies behind is moved to ``metrics.rewound.jsonl``: it belongs to
        steps that a resume does again."""
        if keep_bytes is not None and path.exists() and path.stat().st_size > keep_bytes:
            with path.open("rb+") as file:
                file.seek(keep_bytes)
                rewound = file.read()
                with path.with_name("metrics.rewound.jsonl").open("ab") as aside:
                    aside.write(rewound)
                file.truncate(keep_bytes)
        self._file = path.open("ab")

    def write(self, step: int, values: Mapping[str, float | str]) -> dict[str, Any]:
        """Append one line and return the record. Values that are not finite become the strings "nan", "inf", "-inf"."""
        clean = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        record = {"step": step, "time": time.time(), **clean}
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        return record

    @property
    def bytes(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def read_ledger(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a ledger; a last line cut short by a crash is left out."""
    try:
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield json.loads(line)
    except FileNotFoundError:
        return
