"""Learning curves of several variants (arms) at equal tokens: bits per byte by step, over several seeds.

    python benchmarks/learning.py --data DIR                 # classic against speedrun, DIR has parquet shards
    python benchmarks/learning.py --data DIR --arm base experiments/speedrun.toml \\
        --arm no_smear experiments/speedrun.toml model.smear=false

An arm is a name, an experiment, and overrides. All arms have the same shape (depth 4, T = 512, 8,192 tokens per
step), tokenizer, packing of the data, and seeds 1 to N. Every run is an ordinary `nanochat run`. The table has the mean
over seeds and the standard deviation between them; the difference from the first arm has its standard error.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from nanochat_core.config.load import load
from nanochat_core.plugins.discovery import load_plugins

EXPERIMENTS = Path(__file__).parents[1] / "experiments"

Curve = dict[int, float]  # val/bpb by step


def overrides(file: Path, options: argparse.Namespace, seed: int) -> dict[str, object]:
    entries = [choice.name for choice in load(file, (), load_plugins()).experiment.evaluators]
    return {
        "data.plugin": "parquet",
        "data.path": str(options.data),
        "data.packing": options.packing,
        "tokenizer.vocab_size": options.vocab,
        "model.depth": options.depth,
        "train.max_seq_len": options.seq_len,
        "train.device_batch_size": max(1, options.tokens // options.seq_len),
        "train.total_batch_size": options.tokens,
        "train.num_iterations": options.iterations,
        "train.seed": seed,
        "evaluators.bpb.plugin": "bpb",
        "evaluators.bpb.every": options.every,
        "evaluators.bpb.at_start": True,
        "evaluators.bpb.eval_tokens": options.eval_tokens,
        **{f"evaluators.{name}.remove": True for name in entries if name != "bpb"},
    }


def run(arm: str, file: Path, extra: list[str], options: argparse.Namespace, seed: int) -> Curve:
    """Train once, and print the result."""
    values = overrides(file, options, seed)
    if "speedrun" in file.name and options.device == "cpu":
        values["model.fp8"] = False
    texts = [f"run.name={arm}-{seed}", *(f"{key}={json.dumps(value)}" for key, value in values.items()), *extra]
    with tempfile.TemporaryDirectory() as name:
        runs = options.runs_dir or Path(name)
        before = set(runs.glob(f"{arm}-{seed}/*"))
        command = [sys.executable, "-m", "nanochat_core", "run", str(file), "--runs-dir", str(runs)]
        command += [word for text in texts for word in ("--set", text)]
        environment = {**os.environ, "NANOCHAT_DEVICE": options.device}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{arm}, seed {seed}: {done.stderr or done.stdout}")
        (path,) = set(runs.glob(f"{arm}-{seed}/*")) - before
        records = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rate = statistics.median(r["train/tok_per_sec"] for r in records if "train/tok_per_sec" in r)
    curve = {r["step"]: r["val/bpb"] for r in records if "val/bpb" in r}
    print(f"{arm}, seed {seed}: {curve[max(curve)]:.4f} bpb, {rate:,.0f} tokens/s", flush=True)
    return curve


def table(curves: dict[str, list[Curve]]) -> str:
    """The table in Markdown, with a row per step and a column per arm."""
    first, *others = curves
    head = [
        "step",
        *(f"{arm} ({len(by_seed)} seeds)" for arm, by_seed in curves.items()),
        *(f"{o} - {first}" for o in others),
    ]
    lines = [head, ["---"] * len(head)]
    for step in sorted(curves[first][0]):
        at = {arm: [curve[step] for curve in by_seed] for arm, by_seed in curves.items()}
        cells = [f"{statistics.mean(v):.4f} ± {spread(v):.4f}" for v in at.values()]
        for other in others:
            difference = statistics.mean(at[other]) - statistics.mean(at[first])
            error = math.sqrt(sum(spread(at[arm]) ** 2 / len(at[arm]) for arm in (first, other)))
            cells.append(f"{difference:+.4f} ± {error:.4f}")
        lines.append([str(step), *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory of parquet shards")
    parser.add_argument(
        "--arm",
        nargs="+",
        action="append",
        metavar=("NAME", "FILE"),
        help="name, experiment and overrides KEY=VALUE of an arm; may be repeated",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens per step")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--packing", choices=["stream", "best_fit"], default="stream")
    parser.add_argument("--every", type=int, default=25, help="steps between evaluations")
    parser.add_argument("--eval-tokens", type=int, default=262144)
    parser.add_argument("--device", default="cpu", help="value of NANOCHAT_DEVICE")
    parser.add_argument("--runs-dir", type=Path, help="directory that keeps the runs")
    options = parser.parse_args()
    arms = {name: (Path(file), extra) for name, file, *extra in options.arm or ()}
    if not arms:
        arms = {name: (EXPERIMENTS / f"{name}.toml", list[str]()) for name in ("classic", "speedrun")}
    curves: dict[str, list[Curve]] = {arm: [] for arm in arms}
    for seed in range(1, options.seeds + 1):  # arms alternate, so that results can be compared if it is stopped early
        for arm, (file, extra) in arms.items():
            curves[arm].append(run(arm, file, extra, options, seed))
    shape = (
        f"depth {options.depth}, T = {options.seq_len}, {options.tokens} tokens per step, vocabulary {options.vocab}"
    )
    print(f"\n{shape}, {options.packing}, val/bpb over {options.eval_tokens} tokens\n\n{table(curves)}")


if __name__ == "__main__":
    main()
