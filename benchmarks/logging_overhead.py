"""What logging costs a fast model: seconds a step with no logger, with all of them, and with one that hangs.

    python benchmarks/logging_overhead.py

Trains a model of a few thousand parameters (a few milliseconds a step) with each set of loggers in turn, several times,
and compares the best medians: ``train/dt`` of the ledger, and the time from one step to the next, which has the writing
of the ledger and the looking at loggers in it. On a busy machine runs differ by more than loggers cost, so the second
table measures the training process's share: microseconds of ``Logs.record``, called 20 times a second as a real run
would, and back to back.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

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
    "all": table("csv") + table("tensorboard") + table("wandb", mode="offline") + table("aim"),
    "hanging": table("hangs", timeout=5),
}


def install_hanging_logger(site: Path) -> None:
    (site / "hanging_logger").mkdir()
    (site / "hanging_logger" / "__init__.py").touch()
    (site / "hanging_logger" / "plugin.py").write_text(PLUGIN)
    (site / "hanging_logger" / "logger.py").write_text(HANGS)
    info = site / "hanging_logger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hanging-logger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[nanochat]\nhangs = hanging_logger.plugin\n")


def measure(directory: Path, arm: str, steps: int, index: int) -> tuple[float, float]:
    """Median milliseconds of a step, and from one step to the next, after a warm-up."""
    file = directory / f"{arm}.toml"
    file.write_text(EXPERIMENT.format(steps=steps) + ARMS[arm])
    runs = directory / f"runs-{index}"
    environment = {**os.environ, "PYTHONPATH": str(directory / "site"), "NANOCHAT_DEVICE": "cpu"}
    command = [sys.executable, "-m", "nanochat_core", "run", str(file), "--runs-dir", str(runs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    (ledger,) = runs.glob(f"{arm}/*/metrics.jsonl")
    records = [json.loads(line) for line in ledger.read_text().splitlines()][steps // 2 :]
    between = [1000 * (b["time"] - a["time"]) for a, b in itertools.pairwise(records)]
    return statistics.median(1000 * r["train/dt"] for r in records), statistics.median(between)


RECORD = """
import statistics, sys, time
from pathlib import Path
from nanochat_core import LoggerContext
from nanochat_core.load import load
from nanochat_core.logs import Logs
from nanochat_core.plugins import load_plugins
from nanochat_core.rundir import RunDirectory
directory = Path(sys.argv[2])
directory.mkdir(parents=True)
logs = Logs(RunDirectory(directory))
logs.open_ledger()
experiment = load(sys.argv[1], (), load_plugins()).require_all().experiment
logs.start_loggers(experiment.loggers, LoggerContext(directory, "x", "1", "p", "", (), {}, 10, 0))
values = {f"train/{i}": 1.0 / (i + 1) for i in range(12)}
time.sleep(3)  # loggers start
for step, pause in ((0, 0.05), (100, 0.0)):
    spent = []
    for k in range(100 if pause else 5000):
        started = time.perf_counter()
        logs.record(step + k, values)
        spent.append(time.perf_counter() - started)
        time.sleep(pause)
    print(1e6 * statistics.median(spent))
for process in logs._processes:
    process.kill()
"""


def record_cost(directory: Path, arm: str) -> tuple[float, float]:
    """Median microseconds of ``Logs.record``: 20 times a second, and back to back."""
    environment = {**os.environ, "PYTHONPATH": str(directory / "site")}
    command = [sys.executable, "-c", RECORD, str(directory / f"{arm}.toml"), str(directory / "record" / arm / "1")]
    lines = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    return float(lines[0]), float(lines[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "site").mkdir()
        install_hanging_logger(directory / "site")
        found: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
        for index in range(options.rounds):
            for arm in ARMS:
                found[arm].append(measure(directory, arm, options.steps, index))
        records = {arm: record_cost(directory, arm) for arm in ARMS}
    base = min(between for _, between in found["none"])
    print(f"{'loggers':10}  {'ms a step':>9}  {'ms between':>10}  {'steps/s':>8}  {'against none':>12}")
    for arm, values in found.items():
        step, between = min(v[0] for v in values), min(v[1] for v in values)
        print(f"{arm:10}  {step:9.3f}  {between:10.3f}  {1000 / between:8.1f}  {100 * (between / base - 1):+11.2f}%")
    print("\nmicroseconds a record costs the training process")
    print(f"{'loggers':10}  {'20 a second':>11}  {'back to back':>12}")
    for arm, (paced, packed) in records.items():
        print(f"{arm:10}  {paced:11.1f}  {packed:12.1f}")


if __name__ == "__main__":
    main()
