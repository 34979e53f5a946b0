"""``nanochat plan FILE``: what a run will cost."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nanochat_core.cli import above_zero, add_experiment, positive
from nanochat_core.errors import NanochatError

if TYPE_CHECKING:
    from nanochat_core.schema import Experiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_experiment(parser)
    parser.add_argument("--nproc", type=positive, default=1, metavar="N", help="plan for N devices")
    parser.add_argument(
        "--tok-per-sec", type=above_zero, metavar="X", help="tokens a second of all devices, to tell the time"
    )
    parser.add_argument("--probe", action="store_true", help="measure tokens a second on this device for some seconds")


def main(options: argparse.Namespace, _: Sequence[str]) -> int:
    from nanochat_core.load import load
    from nanochat_core.plugins import load_plugins

    loaded = load(options.file, options.overrides, load_plugins())
    blocking = [p for p in loaded.missing if p.key.split(".")[0] in ("tokenizer", "model", "optimizer")]
    if blocking:
        loaded.require_all()
    from nanochat_core.distributed import pick_device
    from nanochat_core.plan import format_plan, make_plan, time_training

    device = pick_device(0)
    planned = make_plan(loaded, options.nproc, device)
    print(f"experiment {planned.experiment.run.name}\n{format_plan(planned)}")
    speed, how = options.tok_per_sec, "as given"
    if speed is None and options.probe:
        speed = options.nproc * time_training(planned, device)
        how = "measured, forward and backward of one micro-batch" + (f", times {options.nproc}" * (options.nproc > 1))
    if speed is not None:
        seconds = planned.plan.total_tokens / speed
        print(f"  time: {_duration(seconds)} of training at {speed:,.0f} tokens/s ({how})")
    else:
        print("  time: unknown; measure it here with --probe, or give --tok-per-sec X")
    if not [problem for problem in loaded.missing if problem.key.split(".")[0] == "data"]:
        print(f"  validation data: {_validation_data(loaded.experiment)}", flush=True)
    for problem in planned.problems:
        print(f"can't run here: {problem}", file=sys.stderr)
    for problem in loaded.missing:
        print(f"missing: {problem}", file=sys.stderr)
    return 0


def _validation_data(experiment: Experiment) -> str:
    """The set that results will be measured on."""
    from nanochat_core.build import build_source

    try:
        source = build_source(experiment.data)
        return f"{len(source.documents('val')):,} documents, fingerprint {source.fingerprint('val')[:12]}"
    except NanochatError as error:
        return f"unknown ({error})"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
