"""What evaluations leave on disk: ``<run>/evaluations/<entry>_<step>/``. No torch.

``evaluation.json`` has metrics and facts, ``examples.parquet`` a row an example, ``table.md`` scores with 95%
confidence intervals; an evaluator's own files lie beside them.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import numpy.typing as npt

from nanochat_core.errors import DataError
from nanochat_core.runs.directory import write_atomic

if TYPE_CHECKING:
    from nanochat_core.interfaces.model import Evaluation

FACTS, EXAMPLES, TABLE = "evaluation.json", "examples.parquet", "table.md"
DRAWS = 2000  # of a bootstrap
SEED = 1

Values = npt.NDArray[np.float64]


@attrs.frozen
class Stored:
    """An evaluation on disk.

    Args:
        values: of each task by example; ``centered`` the same, centered.
    """

    path: Path
    facts: Mapping[str, Any]
    values: Mapping[str, Mapping[str, float]]
    centered: Mapping[str, Mapping[str, float]]

    @property
    def name(self) -> str:
        return str(self.facts["name"])

    @property
    def metrics(self) -> Mapping[str, float]:
        metrics: Mapping[str, float] = self.facts["metrics"]
        return metrics


def evaluation_dir(directory: Path, name: str, step: int) -> Path:
    return directory / f"{name}_{step:06d}"


def write_evaluation(
    directory: Path, name: str, step: int, evaluation: Evaluation, more: Mapping[str, Any] | None = None
) -> Path:
    """Write an evaluation under ``directory``; one that stands there already is replaced. Returns its directory.

    Args:
        more: facts besides the evaluator's own.
    """
    path = evaluation_dir(directory, name, step)
    path.mkdir(parents=True, exist_ok=True)
    for file in (EXAMPLES, TABLE):
        (path / file).unlink(missing_ok=True)
    if evaluation.examples:
        import pyarrow as pa
        import pyarrow.parquet as pq

        temporary = path / f".{EXAMPLES}"
        pq.write_table(pa.Table.from_pylist([dict(row) for row in evaluation.examples]), temporary)
        temporary.replace(path / EXAMPLES)
        write_atomic(path / TABLE, markdown(evaluation))
    for file, text in evaluation.files.items():
        write_atomic(path / file, text)
    facts = {
        "name": name, "step": step, "time": time.time(), "metrics": dict(evaluation.metrics),
        "notes": list(evaluation.notes), "texts": dict(evaluation.texts), **(more or {}),
        "facts": dict(evaluation.facts),
    }  # fmt: skip
    write_atomic(path / FACTS, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    return path


def read_evaluation(path: Path) -> Stored:
    """What ``write_evaluation`` wrote.

    Raises:
        DataError: when it can't be read.
    """
    values: dict[str, dict[str, float]] = {}
    centered: dict[str, dict[str, float]] = {}
    try:
        facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
        if (path / EXAMPLES).is_file():
            import pyarrow.parquet as pq

            table = pq.read_table(path / EXAMPLES)
            names = [name for name in ("task", "example", "value", "centered") if name in table.column_names]
            seen: dict[tuple[str, str], int] = {}
            for row in table.select(names).to_pylist():
                task, example = row["task"], row["example"]
                seen[task, example] = seen.get((task, example), 0) + 1
                key = f"{example}/{seen[task, example]}"  # the same example may stand in a task several times
                values.setdefault(task, {})[key] = row["value"]
                centered.setdefault(task, {})[key] = row.get("centered", row["value"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} can't be read as an evaluation ({error}): evaluate again") from error
    return Stored(path, facts, values, centered)


def find_evaluations(directory: Path) -> dict[str, Stored]:
    """The newest evaluation of each entry under ``directory``."""
    newest: dict[str, Stored] = {}
    for file in directory.glob(f"*/{FACTS}"):
        with contextlib.suppress(DataError):
            found = read_evaluation(file.parent)
            known = newest.get(found.name)
            if known is None or (found.facts["step"], found.facts["time"]) > (known.facts["step"], known.facts["time"]):
                newest[found.name] = found
    return dict(sorted(newest.items()))


# ------------------------------------------------------------------------------------------------------ statistics


def bootstrap_means(values: Values, rng: np.random.Generator) -> Values:
    """Means of ``DRAWS`` samples with replacement."""
    if set(np.unique(values)) <= {0.0, 1.0}:  # then the number of ones in a sample is binomial
        return rng.binomial(len(values), values.mean(), DRAWS) / len(values)
    draws = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(DRAWS)]
    return np.array(draws)


def interval(means: Values) -> tuple[float, float]:
    """The middle 95%."""
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of so many wins and losses when both are equally likely; McNemar's for right and wrong."""
    n, few = wins + losses, min(wins, losses)
    if n == 0:
        return 1.0
    log_p = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(few + 1)]
    return min(1.0, 2 * math.fsum(math.exp(x) for x in log_p))


def markdown(evaluation: Evaluation) -> str:
    """Score of each task with its confidence interval, their mean last."""
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
        scale = _scale(values, centered)
        moved = centered.mean() + (means - values.mean()) * scale
        total += moved
        centers.append(float(centered.mean()))
        lines.append(
            f"| {task} | {len(rows)} | {values.mean():.4f} | {_range(means)} | {centers[-1]:.4f} | {_range(moved)} |"
        )
    mean = sum(centers) / len(centers)
    lines.append(f"| mean | {len(evaluation.examples)} | | | {mean:.4f} | {_range(total / len(centers))} |")
    return "\n".join(lines) + "\n"


def _scale(values: Values, centered: Values) -> float:
    """By how much centering, which is linear, stretches."""
    spread = float(values.max() - values.min())
    return float(centered.max() - centered.min()) / spread if spread else 0.0


def _range(means: Values) -> str:
    low, high = interval(means)
    return f"{low:.4f} to {high:.4f}"


@attrs.frozen
class Difference:
    """How B differs from A on the examples that both have seen.

    Args:
        n: how many those are.
        low, high: 95% confidence interval of the difference, from a paired bootstrap.
        wins, losses: examples with a higher and a lower value in B.
        p: of a sign test; NaN for the mean over tasks.
    """

    task: str
    n: int
    a: float
    b: float
    low: float
    high: float
    wins: int
    losses: int
    p: float


def other_data(a: Stored, b: Stored) -> list[str]:
    """Splits whose rows both evaluations read, but of other data: their scores don't compare."""
    ours, theirs = (stored.facts.get("data", {}) for stored in (a, b))
    return sorted(split for split in ours.keys() & theirs.keys() if ours[split] != theirs[split])


def compare(a: Stored, b: Stored) -> list[Difference]:
    """Differences in each task, and in the mean of the centered ones, for two evaluations of one kind."""
    rng = np.random.default_rng(SEED)
    found = []
    total: Values = np.zeros(DRAWS)
    means = []
    for task in a.values:
        keys = [key for key in a.values[task] if key in b.values.get(task, {})]
        if not keys:
            continue
        ours, theirs = (np.array([side.values[task][key] for key in keys]) for side in (a, b))
        centers = [np.array([side.centered[task][key] for key in keys]) for side in (a, b)]
        change = theirs - ours
        # Samples of examples, each with its pair of values.
        kinds, counts = np.unique(change, return_counts=True)
        if len(kinds) <= 64:
            draws = rng.multinomial(len(keys), counts / len(keys), DRAWS) @ kinds / len(keys)
        else:
            draws = np.array([change[rng.integers(0, len(keys), len(keys))].mean() for _ in range(DRAWS)])
        scale = _scale(np.concatenate([ours, theirs]), np.concatenate(centers))
        total += draws * scale
        means.append((float(centers[0].mean()), float(centers[1].mean())))
        wins, losses = int((change > 0).sum()), int((change < 0).sum())
        p = sign_test(wins, losses)
        low, high = interval(draws)
        found.append(Difference(task, len(keys), float(ours.mean()), float(theirs.mean()), low, high, wins, losses, p))
    if found:
        low, high = interval(total / len(means))
        before, after = (sum(side) / len(means) for side in zip(*means, strict=True))
        wins, losses = sum(d.wins for d in found), sum(d.losses for d in found)
        n = sum(d.n for d in found)
        found.append(Difference("mean, centered", n, before, after, low, high, wins, losses, math.nan))
    return found


def format_comparison(differences: Sequence[Difference]) -> str:
    """A Markdown table."""
    lines = [
        "| task | examples | A | B | B - A | 95% | better | worse | p |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for d in differences:
        p = "" if math.isnan(d.p) else f"{d.p:.3g}"
        lines.append(
            f"| {d.task} | {d.n} | {d.a:.4f} | {d.b:.4f} | {d.b - d.a:+.4f} | {d.low:+.4f} to {d.high:+.4f} "
            f"| {d.wins} | {d.losses} | {p} |"
        )
    return "\n".join(lines)
