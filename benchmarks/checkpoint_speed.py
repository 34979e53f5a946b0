"""Cost of saving checkpoints, and duration of a resume.

    python benchmarks/checkpoint_speed.py

Trains the same model without saves, with a save every 10 steps, and with such saves in the background, in alternating
rounds, each run in its own process. ``steps/s`` counts from the 10th step to the end of the last save, so that a save
in progress counts too; ``against none`` is the median over rounds of the ratio to the run without saves in the same
round. ``resume`` is the time to verify and read a checkpoint, by its size, without building the model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from small_experiment import small_experiment

from nanochat_core.runs.checkpoint import latest_checkpoint, load_checkpoint

ARMS = {
    "none": [],
    "every 10": ["checkpoint.save_every=10"],
    "in background": ["checkpoint.save_every=10", "checkpoint.asynchronous=true"],
}
# Records the time after the 10th step, and when all saves are complete: every variant saves the last step.
PROBE = """
import json, sys, time
from nanochat_core.cli import main
from nanochat_core.loggers.run_log import Logs
from nanochat_core.training.checkpoints import Checkpoints
points, record, finish = [], Logs.record, Checkpoints.finish_saving
def measured(self, step, values):
    record(self, step, values)
    if step == 10: points.append(time.perf_counter())
def finished(self):
    finish(self)
    points.append(time.perf_counter())
Logs.record, Checkpoints.finish_saving = measured, finished
code = main(["run", *sys.argv[2:]])
open(sys.argv[1], "w").write(json.dumps(points))
sys.exit(code)
"""


def measure(directory: Path, arm: str, depth: int, steps: int) -> tuple[float, Path]:
    """Train once. Returns steps per second and the run's directory."""
    file, points = directory / f"depth{depth}.toml", directory / "points.json"
    shape = {"max_seq_len": 256, "device_batch_size": 2, "total_batch_size": 512}
    train = {**shape, "num_iterations": steps, "dtype": "float32"}
    file.write_text(small_experiment(model={"depth": depth}, train=train, checkpoint={"keep_last": 2}))
    runs = Path(tempfile.mkdtemp(dir=directory))
    settings = [word for setting in ARMS[arm] for word in ("--set", setting)]
    command = [sys.executable, "-c", PROBE, str(points), str(file), "--runs-dir", str(runs), *settings]
    done = subprocess.run(command, env={**os.environ, "NANOCHAT_DEVICE": "cpu"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    first, last = json.loads(points.read_text())
    return (steps - 11) / (last - first), next(runs.glob("*/*"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=61)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--depths", default="2,4,6", help="depths of models; the cost of saving is measured with the second"
    )
    parser.add_argument("--directory", type=Path, help="directory for runs, on the disk to be measured")
    options = parser.parse_args()
    depths = [int(word) for word in options.depths.split(",")]
    speeds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        for _ in range(options.rounds):
            for arm in ARMS:
                speeds[arm].append(measure(Path(name), arm, depths[1], options.steps)[0])
        print(f"{'saving':14} {'steps/s':>8} {'against none':>13}")
        for arm, measured in speeds.items():
            ratio = statistics.median(s / none for s, none in zip(measured, speeds["none"], strict=True))
            print(f"{arm:14} {statistics.median(measured):8.2f} {ratio:12.0%}")
        print(f"\n{'depth':>5} {'MB':>8} {'resume s':>9} {'MB/s':>7}")
        for depth in depths:
            run = measure(Path(name), "none", depth, 12)[1]
            size = sum(file.stat().st_size for file in run.glob("checkpoints/*/*")) / 1e6
            times = []
            for _ in range(3):
                started = time.perf_counter()
                checkpoint, _ = latest_checkpoint(run / "checkpoints")
                assert checkpoint is not None
                load_checkpoint(checkpoint)
                times.append(time.perf_counter() - started)
            seconds = statistics.median(times)
            print(f"{depth:5} {size:8.1f} {seconds:9.3f} {size / seconds:7.0f}")


if __name__ == "__main__":
    main()
