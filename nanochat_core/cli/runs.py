"""``nanochat runs``: list runs with their status and best result."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanochat_core.cli import add_runs_dir
from nanochat_core.cli.console import age, size, table
from nanochat_core.files import read_regular, shorten
from nanochat_core.runs.directory import RunDirectory, all_runs
from nanochat_core.runs.ledger import best_value, read_ledger

LONGEST = 200  # characters of a text in the table
LONGEST_EXPERIMENT = 4 << 20  # bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_runs_dir(parser)


def main(options: argparse.Namespace, _: Sequence[str]) -> int:
    runs = all_runs(options.runs_dir)
    if not runs:
        print(f"no runs under {options.runs_dir}; start one with: nanochat run experiments/quickstart.toml")
        return 0
    rows = [("NAME", "ID", "STATUS", "STEP", "BEST", "VAL DATA", "AGE", "SIZE"), *(_row(run) for run in runs)]
    print(table(rows, "lllrrlrr"))
    return 0


def _row(run: RunDirectory) -> tuple[str, ...]:
    """Return the row of a run. What is damaged in it is named on stderr, and hides nothing else."""
    status, facts, problems = run.read_status(), run.read_provenance(), run.problems()
    step, horizon, best = status.get("step", 0), status.get("num_iterations", 0), "-"
    lines: list[int] = []
    try:
        for record in read_ledger(run.ledger, lines):
            if "train/loss" in record:
                step = max(step, record["step"] + 1)
        best = _best(run, _comparable_from(facts))
    except (OSError, ValueError, RecursionError) as error:
        name = run.ledger if not run.ledger.is_file() and run.ledger.exists() else run.experiment
        problems.append(f"{name}: {error.strerror if isinstance(error, OSError) else error}")
    if lines:
        problems.append(f"{run.ledger}: {len(lines)} damaged lines are left out, the first is line {lines[0]}")
    for problem in problems:
        print(shown(problem), file=sys.stderr)
    words = [status.get("status", "" if problems else "unknown"), "damaged" if problems else ""]
    now = time.time()
    with contextlib.suppress(OSError):
        now -= status.get("time") or run.path.stat().st_mtime
    return (
        shown(run.name),
        shown(run.id),
        ", ".join(word for word in words if word),
        f"{step}/{horizon}",
        shown(best),
        # results on different validation sets are not comparable
        shown(facts.get("fingerprints", {}).get("val", "-")[:8]),
        age(now),
        size(_bytes(run.path)),
    )


def shown(text: str) -> str:
    """Return a text that others may have written, without characters that a terminal would obey, and not too long."""
    return shorten(text, LONGEST)[1:-1]


def _best(run: RunDirectory, comparable_from: int) -> str:
    """Return the run's ``best_metric`` with its best value; "-" if there is none.

    Raises:
        OSError, ValueError, RecursionError: when the run's experiment or ledger can't be read.
    """
    options = tomllib.loads(read_regular(run.experiment, LONGEST_EXPERIMENT).decode()).get("checkpoint", {})
    metric = options.get("best_metric", "") if isinstance(options, dict) else ""
    if not isinstance(metric, str):
        return "-"
    best_is = "largest" if options.get("best_is") == "largest" else "smallest"
    value = best_value(run.ledger, metric, best_is, comparable_from)
    return f"{metric} {value:.4f}" if value is not None else "-"


def _comparable_from(facts: Mapping[str, Any]) -> int:
    """Return the first step at which the run was evaluated on its current validation data."""
    for attempt in (facts, *reversed(facts.get("earlier", []))):
        change = attempt.get("other_data", {})
        if "val" in change.get("before", {}):
            return int(change["from_step"])
    return 0


def _bytes(path: Path) -> int:
    """Return the total size of all files under a directory, in bytes."""
    total = 0
    for directory, _, files in os.walk(path):
        for name in files:
            with contextlib.suppress(OSError):  # a run in progress renames and removes files
                total += Path(directory, name).stat().st_size
    return total
