"""Cost of the checks in the training loop, and time from SIGTERM to the end of a run.

    python benchmarks/guards.py

The first table compares the trainer's optimizer step with the bare one (forward, backward, gradient norm, clipping,
update), on the same model. In addition it has the guards - the agreement of all ranks on skipping and stopping, the
checks for values that are not finite and for loss spikes, the watchdog - and the ledger. Steps of both kinds alternate,
in changing order; the cost is the median ratio of neighbouring steps.

The second table sends SIGTERM at random moments of a step, and has the time until the process ends: the step is
finished, the run is saved, and loggers and interpreter end.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch
from small_experiment import small_experiment

from nanochat_core.data.loader import Step
from nanochat_core.distributed.failures import Failures
from nanochat_core.distributed.signals import StopRequest
from nanochat_core.distributed.store import RankStore
from nanochat_core.distributed.watchdog import Watchdog
from nanochat_core.distributed.world import World
from nanochat_core.interfaces.types import IGNORED
from nanochat_core.training.metrics import StepTimer
from nanochat_core.training.prepare import prepare
from nanochat_core.training.request import RunRequest
from nanochat_core.training.session import Session
from nanochat_core.training.step import loss_and_gradients
from nanochat_core.training.trainer import Trainer


def bare_step(trainer: Trainer, step: Step) -> float:
    """Run an optimizer step without checks and ledger. Returns its seconds."""
    model, optimizer, dtype = trainer.parts.model, trainer.parts.optimizer, trainer.planned.plan.torch_dtype
    started = time.perf_counter()
    loss_sum, tokens = torch.zeros(()), 0
    for index, batch in enumerate(step.batches):
        tokens += int((batch.targets_BT != IGNORED).sum())
        if index == len(step.batches) - 1:
            optimizer.begin_reduce()
        loss_sum += loss_and_gradients(model, batch, dtype)
    _, norm = torch.stack([loss_sum, optimizer.reduce()]).div(tokens).tolist()
    optimizer.update(min(1.0, 1 / (norm + 1e-6)) / tokens, trainer.multipliers())
    return time.perf_counter() - started


def guarded_step(trainer: Trainer, step: Step) -> float:
    started = time.perf_counter()
    trainer.train_step(step, StepTimer())
    return time.perf_counter() - started


def cost_of_guards(file: Path, runs: Path, steps: int) -> None:
    world = World(0, 1, torch.device("cpu"))
    times: dict[str, list[float]] = {"bare": [], "guarded": []}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.ExitStack() as stack:
        request = RunRequest(file, (), runs)
        setup = prepare(request, *request.load(), world, stack)
        assert setup is not None
        store = RankStore(None)
        watchdog = stack.enter_context(Watchdog(0, 1, store))
        session = Session(setup, world, Failures(0, store), watchdog, StopRequest())
        session.open()
        stack.callback(session.close, "finished")
        trainer = session.build()
        stack.enter_context(trainer.parts.loader)
        trainer.parts.model.train()
        for index in range(steps + 5):
            arms = {"bare": bare_step, "guarded": guarded_step}
            for name in sorted(arms, reverse=index % 2 == 1):
                seconds = arms[name](trainer, next(trainer.parts.loader))
                if index >= 5:
                    times[name].append(seconds)
    pairs = zip(times["guarded"], times["bare"], strict=True)
    ratios = sorted(guarded / bare for guarded, bare in pairs)
    quarter = len(ratios) // 4
    print(f"{'':10} {'ms per step':>12}")
    for name, seconds in times.items():
        print(f"{name:10} {1e3 * statistics.median(seconds):12.2f}")
    middle = f"{ratios[quarter] - 1:+.2%} to {ratios[-quarter - 1] - 1:+.2%}"
    print(f"guards and ledger cost {statistics.median(ratios) - 1:+.2%} (middle half: {middle})")


def time_to_exit(file: Path, runs: Path, nproc: int, seed: int) -> tuple[float, float]:
    """Stop a run. Returns seconds from SIGTERM to the end of the process, and median seconds per step."""
    words = ["run", str(file), "--runs-dir", str(runs), "--nproc", str(nproc), "--set", f"run.name=exit{nproc}-{seed}"]
    environment = {**os.environ, "NANOCHAT_DEVICE": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-m", "nanochat_core", *words], env=environment, stdout=subprocess.DEVNULL
    )
    try:
        ledger = runs / f"exit{nproc}-{seed}"
        while not any(path.read_bytes().count(b"\n") > 12 for path in ledger.glob("*/metrics.jsonl")):
            if process.poll() is not None:
                raise SystemExit("the run ended before it was stopped")
            time.sleep(0.02)
        time.sleep(random.Random(seed).random())
        process.send_signal(signal.SIGTERM)
        started = time.perf_counter()
        code = process.wait(120)
        seconds = time.perf_counter() - started
        assert code == 75, code
    finally:
        process.kill()
    (path,) = ledger.glob("*/metrics.jsonl")
    return seconds, statistics.median(json.loads(line)["train/dt"] for line in path.read_text().splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200, help="pairs of steps")
    parser.add_argument("--signals", type=int, default=5, help="runs to stop, for each number of ranks")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "guards.toml")
        train = {"max_seq_len": 256, "device_batch_size": 8, "total_batch_size": 4096, "num_iterations": 1_000_000}
        file.write_text(small_experiment(model={"depth": options.depth}, train=train))
        cost_of_guards(file, Path(name, "runs"), options.steps)
        print(f"\n{'ranks':>5} {'SIGTERM to exit, s':>19} {'longest':>8} {'s per step':>11}")
        for nproc in (1, 2):
            measured = [time_to_exit(file, Path(name, "runs"), nproc, seed) for seed in range(options.signals)]
            seconds, steps = zip(*measured, strict=True)
            print(f"{nproc:5} {statistics.median(seconds):19.2f} {max(seconds):8.2f} {statistics.median(steps):11.3f}")


if __name__ == "__main__":
    main()
