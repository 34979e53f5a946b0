"""``nanochat run FILE``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from nanochat_core.cli import add_experiment, add_runs_dir, positive
from nanochat_core.distributed.signals import PREEMPTED_EXIT_CODE, Stopped, StopRequest
from nanochat_core.errors import ConfigError, Problem
from nanochat_core.training.request import RunRequest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_experiment(parser)
    add_runs_dir(parser)
    parser.add_argument("--nproc", type=positive, default=1, metavar="N", help="worker processes, one a device")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="newest",
        type=_reference,
        metavar="auto|RUN",
        help="continue the newest run of this experiment, or RUN; auto starts fresh when there is none",
    )
    parser.add_argument(
        "--allow-other-data",
        action="store_true",
        help="with --resume: go on although [data] gives other documents than before; those for training are read from "
        "their start",
    )


def _reference(text: str) -> str:
    if text.endswith(".toml"):
        raise argparse.ArgumentTypeError(f"{text} is an experiment, not a run: write it before --resume")
    return text


def main(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    if options.allow_other_data and options.resume is None:
        raise ConfigError([Problem("", "goes with --resume: a fresh run has no data yet", "--allow-other-data")])
    is_worker = "WORLD_SIZE" in os.environ
    request = RunRequest(options.file, options.overrides, options.runs_dir, options.resume, options.allow_other_data)
    loaded = None if is_worker else request.load()  # before torch is imported: a mistake is reported at once
    if options.nproc > 1 and not is_worker:
        from nanochat_core.distributed.launcher import launch

        return launch(arguments, options.nproc)
    with StopRequest() as stop:
        try:
            with stop.interruptible():
                from nanochat_core.training.session import run_experiment
            return run_experiment(request, stop, loaded)
        except Stopped:
            if os.environ.get("RANK", "0") == "0":
                print("stopped by a signal before training began; run it again with --resume auto", file=sys.stderr)
            return PREEMPTED_EXIT_CODE
