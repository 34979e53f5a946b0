"""``nanochat plan FILE``: estimate the memory, time, price and disk space of a run."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nanochat_core.cli import above_zero, add_experiment, processes
from nanochat_core.cli.console import duration, size, table
from nanochat_core.errors import ConfigError, NanochatError, Problem, did_you_mean

if TYPE_CHECKING:
    import torch

    from nanochat_core.config.schema import Experiment
    from nanochat_core.hardware.devices import DeviceSpec
    from nanochat_core.planning.plan import Plan, Planned


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_experiment(parser)
    parser.add_argument(
        "--nproc", type=processes, default=1, metavar="N", help="number of devices to plan for (default: 1)"
    )
    parser.add_argument(
        "--tok-per-sec",
        type=above_zero,
        metavar="X",
        help="training speed of all devices together in tokens per second, to estimate the time",
    )
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="kind of GPU to plan for, such as h100, which this machine need not have (default: this machine)",
    )
    parser.add_argument(
        "--mfu",
        type=above_zero,
        default=40.0,
        metavar="P",
        help="with --device: assumed model FLOPs utilization (MFU), in percent of the peak (default: 40)",
    )
    parser.add_argument(
        "--price", type=above_zero, metavar="X", help="price of all N devices together, in dollars per hour"
    )
    parser.add_argument(
        "--vary",
        type=_variation,
        metavar="KEY=A,B",
        help="compare several values of an option, as in model.depth=12,20",
    )
    parser.add_argument(
        "--probe", action="store_true", help="measure the training speed on this machine for a few seconds"
    )


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
    """Return the training speed in tokens per second over all devices, and its source; (None, "") if it is unknown."""
    from nanochat_core.hardware.devices import DeviceSpec
    from nanochat_core.planning.probe import time_training

    plan, nproc = planned.plan, options.nproc
    if options.tok_per_sec is not None:
        return options.tok_per_sec, "given by --tok-per-sec"
    if options.probe:
        measured = "measured: forward and backward pass of one micro-batch" + (f", times {nproc}" * (nproc > 1))
        return nproc * time_training(planned, here), measured
    if isinstance(device, DeviceSpec) and device.peak is not None and plan.dtype == "bfloat16":
        assumed = f"{options.mfu:g}% of {nproc} x {device.peak / 1e12:,.0f} TFLOP/s, assumed; see --mfu"
        return nproc * device.peak * options.mfu / 100 / plan.flops_per_token, assumed
    return None, ""


def _time_and_price(options: argparse.Namespace, plan: Plan, speed: float | None, how: str) -> list[str]:
    if speed is None:
        return ["time: unknown; measure it on this machine with --probe, or give it with --tok-per-sec X"]
    seconds = plan.total_tokens / speed
    lines = [f"time: {duration(seconds)} of training at {speed:,.0f} tokens/s ({how})"]
    if options.price is not None:
        dollars = seconds / 3600 * options.price
        devices = "for one device" if options.nproc == 1 else f"for all {options.nproc} devices"
        lines.append(f"price: {dollars:,.2f} dollars, at {options.price:g} dollars per hour {devices}")
    return lines


def _variation(text: str) -> tuple[str, list[str]]:
    key, equals, values = text.partition("=")
    if not (key and equals and values):
        raise argparse.ArgumentTypeError(f"write KEY=A,B as in model.depth=12,20, not {text!r}")
    return key, values.split(",")


def _known(name: str) -> DeviceSpec:
    from nanochat_core.hardware.devices import KNOWN_DEVICES

    if name.lower() not in KNOWN_DEVICES:
        message = f"unknown device{did_you_mean(name.lower(), KNOWN_DEVICES)}; known are {', '.join(KNOWN_DEVICES)}"
        raise ConfigError([Problem("", message, f"--device {name}")])
    return KNOWN_DEVICES[name.lower()]


def _table(
    variants: Mapping[str, tuple[Planned, Mapping[int, Mapping[str, int]]]],
    key: str,
    flops_per_second: float | None,
    price: float | None,
) -> str:
    """Return a table with a row for each variant and device batch size: memory, time and price."""
    rows = [[key, "device batch size", "accumulation steps", "GiB per device", "fits", "hours", "dollars"]]
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
    title = f"by device batch size; {plan.room / 2**30:,.1f} GiB per device are available for training:"
    return textwrap.indent(f"{title}\n{table(rows, 'r' * len(rows[0]))}", "  ")


def _disk(planned: Planned) -> str:
    """Return a description of the disk space that the checkpoints of a run take."""
    from nanochat_core.runs.retention import most_at_once

    options, count = planned.experiment.checkpoint, planned.plan.checkpoints
    each = planned.plan.checkpoint_bytes / 2**30
    most = most_at_once(count, options)
    if count == 1:
        return f"1 checkpoint of {each:,.2f} GiB"
    text = f"{count} checkpoints of {each:,.2f} GiB"
    if most == count:
        return f"{text}, all kept: {count * each:,.2f} GiB"
    text += f", at most {most} at a time: {most * each:,.2f} GiB"
    if options.keep_best is None:
        return text
    return f"{text} ({count * each:,.2f} GiB if no saved step has an evaluation with {options.best_metric})"


def _data(experiment: Experiment) -> list[str]:
    """Return lines about the validation data, and about files to download as far as the source knows them."""
    from nanochat_core.data.sources import SAME_DATA, build_source

    lines = []
    try:
        source = build_source(experiment.data)
        count = len(source.documents("val"))
        lines.append(f"validation data: {count:,} documents, fingerprint {source.fingerprint('val')[:12]}")
        if source.fingerprint("train") == source.fingerprint("val"):
            lines.append(f"warning: {SAME_DATA}")
        facts = source.describe()
        missing, files, total = (facts.get(name) for name in ("missing", "files", "bytes"))
        if isinstance(missing, int) and isinstance(files, int) and isinstance(total, int):
            lines.append(f"to download: {missing} of {files} files, about {size(total * missing / max(files, 1))}")
    except NanochatError as error:
        lines.append(f"{'to download' if lines else 'validation data'}: unknown ({error})")
    return lines
