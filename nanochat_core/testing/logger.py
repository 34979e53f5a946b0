"""The contract check of loggers; plugin authors import it from ``nanochat_core.testing``."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from nanochat_core.interfaces.logger import Logger, LoggerContext
from nanochat_core.runs.directory import RunDirectory
from nanochat_core.testing.checks import Check

Series = Mapping[str, Mapping[int, float]]


def check_logger(
    factory: Callable[[Any, LoggerContext], Logger],
    config: Any,
    read: Callable[[Path], Series] | None = None,
) -> None:
    """Check that a logger keeps its contract: over a run that is interrupted after step 7 and resumed from step 4.

    Args:
        factory, config: as in the registration.
        read: returns what the logger wrote for the run in a directory, as metric name to step to value. With it, the
            check covers that no step is lost or doubled, and that values are exact (to float32).

    Raises:
        AssertionError: with a line for every rule that is broken.
    """
    check = Check("logger")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "runs" / "checked" / "run-1"
        directory.mkdir(parents=True)
        check.run(lambda: _log_a_run(check, factory, config, directory, read), "log a run")
    check.finish()


def _log_a_run(
    check: Check,
    factory: Callable[[Any, LoggerContext], Logger],
    config: Any,
    directory: Path,
    read: Callable[[Path], Series] | None,
) -> None:
    def record(step: int, **values: float | str) -> dict[str, Any]:
        return {"step": step, "time": 1.7e9 + step, **values}

    def training(step: int) -> dict[str, Any]:
        return record(step, **{"train/loss": 5.0 / (step + 1), "train/epoch": 0})

    evaluation = record(4, evaluator="tiny", **{"val/tiny": 1.25})
    sample = record(8, evaluator="samples", **{"samples/0": "Hot *is*\n  <b>cold</b> \u00e9\u4e2d", "val/odd": "nan"})
    first = [*map(training, range(4)), evaluation, *map(training, range(4, 8)), sample]
    rewound = [*map(training, range(4)), evaluation, *map(training, range(4, 8)), sample, training(8)]
    context = LoggerContext(
        directory,
        "checked",
        "run-1",
        "nanochat",
        "group",
        ("a", "b"),
        {"model": {"plugin": "tiny"}},
        9,
        0,
        report=lambda line: None,
    )
    ledger = RunDirectory(directory).ledger
    ledger.write_text("".join(json.dumps(r) + "\n" for r in first), encoding="utf-8")
    logger = factory(config, context)
    assert isinstance(logger, Logger), f"the factory must return a nanochat_core.Logger, not {logger!r}"
    for line in first:
        logger.log(line)
    logger.finish("failed")
    ledger.write_text("".join(json.dumps(r) + "\n" for r in rewound), encoding="utf-8")
    resumed = factory(config, attrs.evolve(context, start_step=4))
    for line in rewound:
        if line not in first or (resumed.rewinds and line["step"] >= 4):  # as the core does it
            resumed.log(line)
    resumed.finish("finished")
    if read is None:
        return
    logged = read(directory)
    expected: dict[str, dict[int, float]] = {}
    for line in rewound:
        for key, value in line.items():
            if key not in ("step", "time", "evaluator") and not isinstance(value, str):
                expected.setdefault(key, {})[line["step"]] = value
    for key, series in expected.items():
        have = dict(logged.get(key, {}))
        check.expect(have.keys() == series.keys(), f"{key} has steps {sorted(have)}, not {sorted(series)}")
        close = all(math.isclose(have[step], series[step], rel_tol=1e-6) for step in series if step in have)
        check.expect(close, f"{key} has values that differ from those it was given")
