"""``nanochat plan FILE``: what a run will cost."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nanochat_core.cli import above_zero, add_experiment, positive
from nanochat_core.cli.console import duration, size, table
from nanochat_core.errors import ConfigError, NanochatError, Problem, did_you_mean

if TYPE_CHECKING:
    import torch

    from nanochat_core.config.schema import Experiment
    from nanochat_core.hardware.devices import DeviceSpec
    from nanochat_core.planning.plan import Plan, Planned


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_experiment(parser)
    parser.add_argument("--nproc", type=positive, default=1, metavar="N", help="plan for N devices")
    parser.add_argument(
        "--tok-per-sec", type=above_zero, metavar="X", help="tokens a second of all devices, to tell the time"
    )
    parser.add_argument(
        "--device", metavar="NAME", help="plan for GPUs that need not be here, such as h100; default: this machine"
    )
    parser.add_argument(
        "--mfu",
        type=above_zero,
        default=40.0,
        metavar="P",
        help="with --device: percent of the peak FLOPs that training reaches (default: 40, an assumption)",
    )
    parser.add_argument("--price", type=above_zero, metavar="X", help="dollars an hour of all N devices together")
    parser.add_argument(
        "--vary", type=_variation, metavar="KEY=A,B", help="a part of the table for each value, as in model.depth=12,20"
    )
    parser.add_argument("--probe", action="store_true", help="measure tokens a second on this device for some seconds")


def main(options: argparse.Namespace, _: Sequence[str]) -> int:
    from nanochat_core.config.load import load
    from nanochat_core.plugins.discovery import load_plugins

    plugins = load_plugins()
    loaded = load(options.file, options.overrides, plugins)
    blocking = [p for p in loaded.missing if p.key.split(".")[0] in ("tokenizer", "model", "optimizer")]
    if blocking:
        loaded.require_all()
    from nanochat_core.hardware.machine import pick_device
    from nanochat_core.planning.banner import format_plan
    from nanochat_core.planning.planner import plan_batches

    here = pick_device(0)
    device = here if options.device is None else _known(options.device)
    planned, batches = plan_batches(loaded, options.nproc, device)
    plan = planned.plan
    print(f"experiment {planned.experiment.run.name}\n{format_plan(planned)}")
    speed, how = _speed(options, planned, device, here)
    for line in _time_and_price(options, plan, speed, how):
        print(f"  {line}")
    print(f"  disk: {_disk(planned)}")
    if not [problem for problem in loaded.missing if problem.key.split(".")[0] == "data"]:
        for line in _data(loaded.experiment):
            print(f"  {line}", flush=True)
    flops_per_second = None if speed is None else speed * plan.flops_per_token
    variants = {"": (planned, batches)}
    if options.vary:
        key, values = options.vary
        variants = {}
        for value in values:
            varied = load(options.file, [*options.overrides, f"{key}={value}"], plugins)
            variants[value] = plan_batches(varied, options.nproc, device)
    print(_table(variants, "" if not options.vary else options.vary[0], flops_per_second, options.price))
    for problem in planned.problems:
        print(f"can't run {'there' if options.device else 'here'}: {problem}", file=sys.stderr)
    for problem in loaded.missing:
        print(f"missing: {problem}", file=sys.stderr)
    return 0


def _speed(
    options: argparse.Namespace, planned: Planned, device: torch.device | DeviceSpec, here: torch.device
) -> tuple[float | None, str]:
    """(tokens per second of all devices, where the number is from); None when it is unknown."""
    from nanochat_core.hardware.devices import DeviceSpec
    from nanochat_core.planning.probe import time_training

    plan, nproc = planned.plan, options.nproc
    if options.tok_per_sec is not None:
        return options.tok_per_sec, "as given"
    if options.probe:
        measured = "measured, forward and backward of one micro-batch" + (f", times {nproc}" * (nproc > 1))
        return nproc * time_training(planned, here), measured
    if isinstance(device, DeviceSpec) and device.peak is not None and plan.dtype == "bfloat16":
        assumed = f"{options.mfu:g}% of {nproc} x {device.peak / 1e12:,.0f} TFLOP/s, an assumption: see --mfu"
        return nproc * device.peak * options.mfu / 100 / plan.flops_per_token, assumed
    return None, ""


def _time_and_price(options: argparse.Namespace, plan: Plan, speed: float | None, how: str) -> list[str]:
    if speed is None:
        return ["time: unknown; measure it here with --probe, or give --tok-per-sec X"]
    seconds = plan.total_tokens / speed
    lines = [f"time: {duration(seconds)} of training at {speed:,.0f} tokens/s ({how})"]
    if options.price is not None:
        dollars = seconds / 3600 * options.price
        devices = f"an hour for all {options.nproc} devices"
        lines.append(f"price: {dollars:,.2f} dollars, at {options.price:g} dollars {devices}")
    return lines


def _variation(text: str) -> tuple[str, list[str]]:
    key, equals, values = text.partition("=")
    if not (key and equals and values):
        raise argparse.ArgumentTypeError(f"write KEY=A,B as in model.depth=12,20, not {text!r}")
    return key, values.split(",")


def _known(name: str) -> DeviceSpec:
    from nanochat_core.hardware.devices import KNOWN_DEVICES

    if name.lower() not in KNOWN_DEVICES:
        known = f"{', '.join(KNOWN_DEVICES)} are known{did_you_mean(name.lower(), KNOWN_DEVICES)}"
        raise ConfigError([Problem("", known, f"--device {name}")])
    return KNOWN_DEVICES[name.lower()]


def _table(
    variants: Mapping[str, tuple[Planned, Mapping[int, Mapping[str, int]]]],
    key: str,
    flops_per_second: float | None,
    price: float | None,
) -> str:
    """Memory by micro-batch, and time and price, of each variant."""
    rows = [[key or "", "device batch", "accumulation", "GiB a device", "fits", "hours", "dollars"]]
    for value, (planned, batches) in variants.items():
        plan = planned.plan
        seconds = None if flops_per_second is None else plan.total_flops / flops_per_second
        hours = "?" if seconds is None else f"{seconds / 3600:,.2f}"
        dollars = "?" if seconds is None or price is None else f"{seconds / 3600 * price:,.2f}"
        for batch, memory in batches.items():
            known, total = "activations" in memory, sum(memory.values())
            fits = ("yes" if total <= plan.room else "no") if known else "?"
            accumulation = f"{plan.rows_per_step // (plan.world_size * batch):,}"
            needed = f"{total / 2**30:,.2f}" if known else "?"
            rows.append([value, f"{batch:,}", accumulation, needed, fits, hours, dollars])
    plan = next(iter(variants.values()))[0].plan
    title = f"by device batch; {plan.room / 2**30:,.1f} GiB may be taken of a device:"
    return textwrap.indent(f"{title}\n{table(rows, 'r' * len(rows[0]))}", "  ")


def _disk(planned: Planned) -> str:
    """What checkpoints take."""
    from nanochat_core.runs.retention import most_at_once

    each, count, options = (
        planned.plan.checkpoint_bytes / 2**30,
        planned.plan.checkpoints,
        planned.experiment.checkpoint,
    )
    most = most_at_once(count, options)
    text = f"{count} checkpoints of {each:,.2f} GiB"
    if most == count:
        return f"{text}, {count * each:,.1f} GiB if all are kept"
    text += f", at most {most} at one time: {most * each:,.1f} GiB"
    if options.keep_best is None:
        return text
    return f"{text} ({count * each:,.1f} GiB if no step that is saved has an evaluation with {options.best_metric})"


def _data(experiment: Experiment) -> list[str]:
    """The set that results will be measured on, and what is not here yet, as far as the source can say."""
    from nanochat_core.data.sources import build_source

    lines = []
    try:
        source = build_source(experiment.data)
        count = len(source.documents("val"))
        lines.append(f"validation data: {count:,} documents, fingerprint {source.fingerprint('val')[:12]}")
        facts = source.describe()
        missing, files, total = (facts.get(name) for name in ("missing", "files", "bytes"))
        if isinstance(missing, int) and isinstance(files, int) and isinstance(total, int):
            lines.append(f"download: {missing} of {files} files, about {size(total * missing / max(files, 1))}")
    except NanochatError as error:
        lines.append(f"{'download' if lines else 'validation data'}: unknown ({error})")
    return lines
