"""``nanochat run FILE``: train an experiment."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from nanochat_core.cli import add_experiment, add_runs_dir, processes
from nanochat_core.distributed.environment import check_nproc, find_place, is_worker
from nanochat_core.distributed.signals import PREEMPTED_EXIT_CODE, Stopped, StopRequest
from nanochat_core.errors import ConfigError, Problem
from nanochat_core.training.request import RunRequest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_experiment(parser)
    add_runs_dir(parser)
    parser.add_argument(
        "--nproc",
        type=processes,
        default=1,
        metavar="N",
        help="number of worker processes, one per device (default: 1)",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="newest",
        type=_reference,
        metavar="auto|RUN",
        help="continue RUN or, without RUN, the newest run of this experiment; auto starts a new run if there is none",
    )
    parser.add_argument(
        "--allow-other-data",
        action="store_true",
        help="with --resume: continue although the documents of [data] have changed; changed training documents are "
        "read from their start",
    )


def _reference(text: str) -> str:
    if text.endswith(".toml"):
        raise argparse.ArgumentTypeError(f"{text} is an experiment, not a run: write it before --resume")
    return text


def main(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    if options.allow_other_data and options.resume is None:
        raise ConfigError(
            [Problem("", "is only allowed with --resume: a new run has no earlier data", "--allow-other-data")]
        )
    check_nproc(options.nproc)
    request = RunRequest(options.file, options.overrides, options.runs_dir, options.resume, options.allow_other_data)
    loaded = None if is_worker() else request.load()  # before torch is imported, so that mistakes are reported at once
    if options.nproc > 1 and not is_worker():
        from nanochat_core.distributed.launcher import launch

        return launch(arguments, options.nproc)
    stop = StopRequest()
    stop.install()  # until the process ends: a signal that comes after the run has ended must not change its exit code
    try:
        with stop.interruptible():
            from nanochat_core.training.session import run_experiment
        return run_experiment(request, stop, loaded)
    except Stopped:
        if find_place().rank == 0:
            print("stopped by a signal before training began; run it again with: --resume auto", file=sys.stderr)
        return PREEMPTED_EXIT_CODE
    finally:
        stop.over()
