"""Evaluations on disk, in ``<run>/evaluations/<entry>_<step>/``. This module imports no torch.

``evaluation.json`` has metrics and facts, ``examples.parquet`` a row per example, ``table.md`` scores with 95%
confidence intervals. The evaluator's own files are in the same directory.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from nanochat_core.errors import DataError
from nanochat_core.evaluation.statistics import DRAWS, SEED, Values, bootstrap_means, interval, scale_of
from nanochat_core.files import name_problem, path_in, read_json, shorten, write_atomic

if TYPE_CHECKING:
    from nanochat_core.interfaces.evaluator import Evaluation

FACTS, EXAMPLES, TABLE = "evaluation.json", "examples.parquet", "table.md"


@attrs.frozen
class Stored:
    """An evaluation on disk.

    Args:
        path: its directory.
        facts: the content of ``evaluation.json``.
        values: values by task and example; ``centered``: centered values by task and example.
    """

    path: Path
    facts: Mapping[str, Any]
    values: Mapping[str, Mapping[str, float]]
    centered: Mapping[str, Mapping[str, float]]

    @property
    def name(self) -> str:
        return str(self.facts["name"])

    @property
    def own_facts(self) -> Mapping[str, Any]:
        """The evaluator's own facts, including its settings."""
        facts: Mapping[str, Any] = self.facts.get("facts", {})
        return facts

    @property
    def settings(self) -> Sequence[str]:
        """Names of the facts that results depend on; for version 0.1.0, which did not record any, all single values."""
        names: Sequence[str] | None = self.facts.get("settings")
        return names if names is not None else [k for k, v in self.own_facts.items() if not isinstance(v, dict | list)]

    @property
    def metrics(self) -> Mapping[str, float]:
        metrics: Mapping[str, float] = self.facts["metrics"]
        return metrics


def evaluation_dir(directory: Path, name: str, step: int) -> Path:
    return directory / f"{name}_{step:06d}"


def encode_files(evaluation: Evaluation) -> dict[str, bytes]:
    """Return the content of the files that keep an evaluation besides ``evaluation.json``, by name.

    Raises:
        ValueError: when a name can't be a file's; ``UnicodeError`` is one.
        Exception: pyarrow's, when the examples are no table.
    """
    encoded = {}
    if evaluation.examples:
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = dict.fromkeys(name for row in evaluation.examples for name in row)
        examples = pa.BufferOutputStream()
        pq.write_table(pa.table({n: [row.get(n) for row in evaluation.examples] for n in names}), examples)
        encoded = {EXAMPLES: examples.getvalue().to_pybytes()}
    for name, text in evaluation.files.items():
        path_in(Path(), name)
        if name in (FACTS, EXAMPLES, TABLE):
            raise ValueError(f"the name {name} belongs to the core's own file")
        encoded[name] = text.encode()
    return encoded


def write_evaluation(
    directory: Path, name: str, step: int, evaluation: Evaluation, more: Mapping[str, Any] | None = None
) -> Path:
    """Write an evaluation under ``directory``, replacing an earlier one of the same step. Returns its directory.

    Args:
        more: further entries of ``evaluation.json``.
    """
    path = evaluation_dir(directory, name, step)
    directory.mkdir(exist_ok=True)  # not those above: a run directory that was moved does not come back
    path.mkdir(exist_ok=True)
    for file in (EXAMPLES, TABLE):
        (path / file).unlink(missing_ok=True)
    for file, content in encode_files(evaluation).items():
        write_atomic(path_in(path, file), content)
    if evaluation.examples:
        write_atomic(path / TABLE, markdown(evaluation))
    facts = {
        "name": name,
        "step": step,
        "time": time.time(),
        "metrics": dict(evaluation.metrics),
        "notes": list(evaluation.notes),
        "texts": dict(evaluation.texts),
        **(more or {}),
        "facts": {**evaluation.settings, **evaluation.facts},
        "settings": list(evaluation.settings),
    }
    write_atomic(path / FACTS, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    return path


def read_evaluation(path: Path) -> Stored:
    """Read an evaluation that ``write_evaluation`` wrote.

    Raises:
        DataError: when a file of it can't be read.
    """
    values: dict[str, dict[str, float]] = {}
    centered: dict[str, dict[str, float]] = {}
    try:
        facts = read_json(path / FACTS)
        _check_facts(facts)
        if (path / EXAMPLES).is_file():
            import pyarrow.parquet as pq

            table = pq.read_table(path / EXAMPLES)
            names = [name for name in ("task", "example", "value", "centered") if name in table.column_names]
            seen: dict[tuple[str, str], int] = {}
            for row in table.select(names).to_pylist():
                task, example = row["task"], row["example"]
                seen[task, example] = seen.get((task, example), 0) + 1
                key = f"{example}/{seen[task, example]}"  # a task may contain the same example several times
                values.setdefault(task, {})[key] = row["value"]
                centered.setdefault(task, {})[key] = row.get("centered", row["value"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} can't be read as an evaluation ({error}): repeat the evaluation") from error
    return Stored(path, facts, values, centered)


def _check_facts(facts: Mapping[str, Any]) -> None:
    """Raise a ValueError when facts are not of the types that ``write_evaluation`` writes."""
    kinds: dict[str, tuple[type, ...]] = {"name": (str,), "step": (int,), "time": (int, float), "metrics": (dict,)}
    kinds |= {"facts": (dict,), "settings": (list,), "data": (dict,)}
    for name, kind in kinds.items():
        if name in ("facts", "settings", "data") and name not in facts:
            continue
        if not isinstance(facts.get(name), kind) or isinstance(facts.get(name), bool):
            raise ValueError(f"{name} must not be {shorten(facts.get(name))}")
    if name_problem(facts["name"]):
        raise ValueError(f"the name {shorten(facts['name'])} {name_problem(facts['name'])}")
    for name, value in facts["metrics"].items():
        too_large = isinstance(value, int) and abs(value) >= 2**1023  # a number that is no float
        if not isinstance(value, int | float) or isinstance(value, bool) or too_large:
            raise ValueError(f"metric {shorten(name)} must not be {shorten(value)}")
    if not all(isinstance(name, str) for name in (*facts.get("settings", []), *facts.get("data", {}).values())):
        raise ValueError("settings and data must have texts")


def find_evaluations(directory: Path) -> dict[str, Stored]:
    """Return the newest evaluation of each entry under ``directory``, by name of the entry; skip unreadable ones."""
    newest: dict[str, Stored] = {}
    for file in directory.glob(f"*/{FACTS}"):
        with contextlib.suppress(DataError):
            stored = read_evaluation(file.parent)
            known = newest.get(stored.name)
            if known is None or _age_key(stored) > _age_key(known):
                newest[stored.name] = stored
    return dict(sorted(newest.items()))


def _age_key(stored: Stored) -> tuple[int, float]:
    return stored.facts["step"], stored.facts["time"]


# ------------------------------------------------------------------------------------------------------ statistics


def markdown(evaluation: Evaluation) -> str:
    """Format a Markdown table: the score of each task with its confidence interval, and their mean."""
    tasks: dict[str, list[Mapping[str, Any]]] = {}
    for row in evaluation.examples:
        tasks.setdefault(row["task"], []).append(row)
    rng = np.random.default_rng(SEED)
    lines = ["| task | examples | score | 95% | centered | 95% |", "|---|---:|---:|---:|---:|---:|"]
    total: Values = np.zeros(DRAWS)
    centers = []
    for task, rows in tasks.items():
        values = np.array([row["value"] for row in rows], dtype=np.float64)
        centered = np.array([row.get("centered", row["value"]) for row in rows], dtype=np.float64)
        means = bootstrap_means(values, rng)
        scale = scale_of(values, centered)
        moved = centered.mean() + (means - values.mean()) * scale
        total += moved
        centers.append(float(centered.mean()))
        lines.append(
            f"| {task} | {len(rows)} | {values.mean():.4f} | {_range(means)} | {centers[-1]:.4f} | {_range(moved)} |"
        )
    mean = sum(centers) / len(centers)
    lines.append(f"| mean | {len(evaluation.examples)} | | | {mean:.4f} | {_range(total / len(centers))} |")
    return "\n".join(lines) + "\n"


def _range(means: Values) -> str:
    low, high = interval(means)
    return f"{low:.4f} to {high:.4f}"
