"""``nanochat runs``: list runs with their status and best result."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanochat_core.cli import add_runs_dir
from nanochat_core.cli.console import age, size, table
from nanochat_core.runs.directory import RunDirectory, all_runs
from nanochat_core.runs.ledger import best_value, read_ledger


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
    status = run.read_status()
    step, horizon = status.get("step", 0), status.get("num_iterations", 0)
    facts = _provenance(run)
    for record in read_ledger(run.ledger):
        if "train/loss" in record:
            step = max(step, record["step"] + 1)
    seconds = time.time() - status.get("time", run.path.stat().st_mtime)
    return (
        run.name,
        run.id,
        status.get("status", "unknown"),
        f"{step}/{horizon}",
        _best(run, _comparable_from(facts)),
        str(facts.get("fingerprints", {}).get("val", "-"))[
            :8
        ],  # results on different validation sets are not comparable
        age(seconds),
        size(_bytes(run.path)),
    )


def _best(run: RunDirectory, comparable_from: int) -> str:
    """Return the run's ``best_metric`` with its best value; "-" if there is none."""
    try:
        options = tomllib.loads(run.experiment.read_text(encoding="utf-8")).get("checkpoint", {})
    except (OSError, ValueError):
        return "-"
    metric = options.get("best_metric", "")
    value = best_value(run.ledger, metric, options.get("best_is", "smallest"), comparable_from)
    return f"{metric} {value:.4f}" if value is not None else "-"


def _provenance(run: RunDirectory) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(run.provenance.read_text())
        return facts
    except (OSError, ValueError):
        return {}


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
            with contextlib.suppress(FileNotFoundError):  # a run in progress renames and removes files
                total += Path(directory, name).stat().st_size
    return total
