"""Peak memory of a training step: prediction of the plan against the measured peak, on random configurations.

    python benchmarks/memory_prediction.py            # 12 configurations of the default seed, on CUDA, else the CPU
    python benchmarks/memory_prediction.py --count 30 --seed 7

A configuration has random depth, heads, T, rows, accumulation, vocabulary, dtype, recipe, optimizer and activation
checkpointing, and is trained for two steps in its own process (in the second the optimizer has its state). On CUDA the
peak is that of the allocator. On a CPU it is the growth of resident memory since before the model was built, with a
malloc that returns freed memory, after a first training of the same configuration: oneDNN keeps code for every shape.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

MIB = 2**20


def draw(generator: random.Random) -> dict[str, Any]:
    """Draw a configuration: the name of an experiment file, and overrides."""
    pick = generator.choice
    length, rows, accumulation = pick([64, 128, 256, 512, 1024]), pick([1, 2, 4, 8]), pick([1, 1, 2])
    recipe, optimizer = pick(["classic.toml", "speedrun.toml"]), pick(["muon_adamw", "adamw"])
    heads = pick([1, 2])
    overrides = {
        "model.depth": generator.randint(2, 8),
        "model.aspect_ratio": pick([32, 48, 64]),
        "model.head_dim": pick([32, 64, 128]),
        "model.softcap": pick([15.0, 15.0, 0.0]),
        "tokenizer.vocab_size": pick([2048, 8192, 16384, 32768]),
        "train.max_seq_len": length,
        "train.device_batch_size": rows,
        "train.total_batch_size": length * rows * accumulation,
        "train.dtype": pick(["float32", "bfloat16"]),
        "train.activation_checkpointing": pick([False, False, True]),
        "train.num_iterations": 100,
        "train.compile": False,
    }
    if heads == 2:
        overrides["model.n_kv_head"] = 1
    if recipe == "speedrun.toml":
        overrides["model.fp8"] = False
    if optimizer == "adamw":
        overrides["optimizer"] = "{plugin = 'adamw'}"
    return {"recipe": recipe, "overrides": overrides}


def arguments(overrides: dict[str, Any]) -> list[str]:
    return [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in overrides.items()]


def measure(configuration: dict[str, Any]) -> dict[str, Any]:
    """Train a configuration in this process. Returns predicted bytes by kind, and measured bytes."""
    import torch
    from training import EXPERIMENTS, Training

    from nanochat_core.hardware.machine import pick_device

    device = pick_device(0)
    file, overrides = EXPERIMENTS / configuration["recipe"], configuration["overrides"]
    if device.type != "cuda":  # 10 to 40 MiB of code that libraries generate for each shape and keep
        _two_steps(Training(file, arguments(overrides), device))
    before = _start_peak(device)
    training = Training(file, arguments(overrides), device)
    _two_steps(training)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")
    return {"predicted": dict(training.plan.memory), "measured": peak - before}


def _two_steps(training: Any) -> None:
    ids, targets = training.batch()
    for _ in range(2):
        training.step(ids, targets)


def _start_peak(device: Any) -> int:
    """Reset the peak. Returns bytes in use."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _status("VmRSS")


def _status(key: str) -> int:
    """A value of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def in_process(configuration: dict[str, Any]) -> dict[str, Any]:
    """Call ``measure`` in another process, where freed memory is returned at once."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--one", json.dumps(configuration)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(json.loads(options.one))))
        return
    generator, ratios = random.Random(options.seed), []
    print(f"{'predicted':>9} {'measured':>9} {'ratio':>6}   MiB; configuration (prediction by kind)")
    for _ in range(options.count):
        configuration = draw(generator)
        result = in_process(configuration)
        predicted, measured = sum(result["predicted"].values()), result["measured"]
        ratios.append(predicted / measured)
        shown = " ".join(f"{k.rpartition('.')[2]}={v}" for k, v in configuration["overrides"].items())
        parts = ", ".join(f"{k} {v / MIB:.0f}" for k, v in result["predicted"].items())
        line = f"{predicted / MIB:>9,.0f} {measured / MIB:>9,.0f} {ratios[-1]:>6.3f}"
        print(f"{line}   {configuration['recipe']} {shown} ({parts})", flush=True)
    worst = max(ratios, key=lambda r: abs(r - 1))
    print(f"worst ratio {worst:.3f}; {sum(abs(r - 1) <= 0.15 for r in ratios)} of {len(ratios)} within 15%")


if __name__ == "__main__":
    main()
