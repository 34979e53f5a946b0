"""What logging costs a fast model: with no logger, with each, with all of them, and with one that hangs.

    python benchmarks/logging_overhead.py

Trains a model of a few thousand parameters (a few milliseconds a step) with each set of loggers in turn, in rounds.
It keeps apart what logging costs the training process and what it costs by competing for cores:

- ``record``: CPU microseconds a step that the training loop spends in ``Logs.record``: writing the ledger, looking at
  the loggers' processes. Loggers cost the training process nothing else.
- ``loop``: CPU milliseconds a step of the loop's thread. It rises when loggers share a cache or a core with it.
- ``steps/s`` and ``against none``: by the clock, the median over rounds of the ratio to the runs without loggers just
  before and after. It has the competition for cores in it, with loggers and with whatever else the machine does; the
  last column, ``none`` against ``none``, says how much of it is noise.

Steps during which loggers start, which takes seconds of CPU once a run, are left out; ``--starting`` counts them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import attrs

EXPERIMENT = """
[tokenizer]
plugin = "bytes"
[data]
plugin = "python_docs"
[model]
plugin = "gpt"
depth = 1
aspect_ratio = 32
head_dim = 16
[optimizer]
plugin = "adamw"
[train]
max_seq_len = 64
device_batch_size = 8
total_batch_size = 512
num_iterations = {steps}
dtype = "float32"
compile = false
"""
HANGS = """
import time
from nanochat_core import Logger
class Hangs(Logger):
    def __init__(self, config, context): ...
    def log(self, record): time.sleep(1000)
"""
PLUGIN = """
import attrs
from nanochat_core import hookimpl
@attrs.frozen
class Config: pass
@hookimpl
def nanochat_register_loggers(registry):
    registry.add("hangs", config=Config, factory="hanging_logger.logger:Hangs", summary="hangs")
"""


def table(plugin: str, **options: object) -> str:
    return "\n".join([f'\n[[loggers]]\nplugin = "{plugin}"', *(f"{k} = {json.dumps(v)}" for k, v in options.items())])


ARMS = {
    "none": "",
    "csv": table("csv"),
    "tensorboard": table("tensorboard"),
    "wandb": table("wandb", mode="offline"),
    "aim": table("aim"),
    "all": table("csv") + table("tensorboard") + table("wandb", mode="offline") + table("aim"),
    "hanging": table("hangs", timeout=5),
}
# Runs an experiment, and writes down at every ledger line: the clock, the thread's CPU time, and that within record.
PROBE = """
import atexit, json, sys, time
from nanochat_core.cli import main
from nanochat_core.logs import Logs
points, record = [], Logs.record
def measured(self, step, values):
    before = time.thread_time()
    record(self, step, values)
    after = time.thread_time()
    if "train/loss" in values:
        points.append((time.perf_counter(), after, after - before))
Logs.record = measured
code = main(["run", *sys.argv[2:]])
open(sys.argv[1], "w").write(json.dumps(points))
sys.exit(code)
"""


def install_hanging_logger(site: Path) -> None:
    (site / "hanging_logger").mkdir()
    (site / "hanging_logger" / "__init__.py").touch()
    (site / "hanging_logger" / "plugin.py").write_text(PLUGIN)
    (site / "hanging_logger" / "logger.py").write_text(HANGS)
    info = site / "hanging_logger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hanging-logger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[nanochat]\nhangs = hanging_logger.plugin\n")


@attrs.frozen
class Cost:
    """Of a step: milliseconds by the clock, CPU milliseconds of the loop's thread, CPU microseconds of record."""

    wall: float
    loop: float
    record: float


def measure(directory: Path, arm: str, steps: int, skip: int, index: str) -> Cost:
    file, points_file = directory / f"{arm}.toml", directory / f"points-{index}.json"
    file.write_text(EXPERIMENT.format(steps=steps) + ARMS[arm])
    arguments = [str(points_file), str(file), "--runs-dir", str(directory / f"runs-{index}")]
    site = os.pathsep.join(filter(None, (str(directory / "site"), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": site, "NANOCHAT_DEVICE": "cpu", "WANDB_SILENT": "true"}
    command = [sys.executable, "-c", PROBE, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    points = json.loads(points_file.read_text())[skip:]
    (first, cpu, _), (last, cpu_at_end, _) = points[0], points[-1]
    count = len(points) - 1
    return Cost(
        1000 * (last - first) / count,
        1000 * (cpu_at_end - cpu) / count,
        1e6 * statistics.median(record for _, _, record in points),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--starting", action="store_true", help="count the steps while loggers start")
    parser.add_argument("--arms", default=",".join(ARMS), help="which of " + ", ".join(ARMS))
    options = parser.parse_args()
    arms = [arm for arm in options.arms.split(",") if arm != "none"]
    skip = 20 if options.starting else options.steps // 2
    found: dict[str, list[Cost]] = {arm: [] for arm in ("none", *arms)}
    ratios: dict[str, list[float]] = {arm: [] for arm in ("none", *arms)}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "site").mkdir()
        install_hanging_logger(directory / "site")
        before = measure(directory, "none", options.steps, skip, "first")
        for index in range(options.rounds):
            for arm in arms:
                cost = measure(directory, arm, options.steps, skip, f"{index}-{arm}")
                after = measure(directory, "none", options.steps, skip, f"{index}-{arm}-none")
                found[arm].append(cost)
                found["none"].append(after)
                ratios[arm].append(cost.wall / ((before.wall + after.wall) / 2))
                ratios["none"].append(after.wall / before.wall)
                before = after
    print(f"{'loggers':12}  {'steps/s':>8}  {'against none':>12}  {'ms loop':>8}  {'us record':>9}")
    for arm, costs in found.items():
        wall, loop, record = (statistics.median(getattr(c, what) for c in costs) for what in ("wall", "loop", "record"))
        slower = 100 * (statistics.median(ratios[arm]) - 1)
        print(f"{arm:12}  {1000 / wall:8.1f}  {slower:+11.2f}%  {loop:8.3f}  {record:9.1f}")
    noise = statistics.median(abs(ratio - 1) for ratio in ratios["none"])
    print(f"\na run without loggers differs from the one before it by {100 * noise:.1f}% (median)")


if __name__ == "__main__":
    main()
