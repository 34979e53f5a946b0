"""What rank 0 decides before a run is built: the plan, the run directory, what to resume from."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import attrs

from nanochat_core.config.load import load
from nanochat_core.distributed.world import World
from nanochat_core.errors import ConfigError
from nanochat_core.hardware.machine import device_spec
from nanochat_core.planning.banner import format_plan
from nanochat_core.planning.plan import Planned
from nanochat_core.planning.planner import make_plan
from nanochat_core.plugins.discovery import load_plugins
from nanochat_core.runs.checkpoint import load_state
from nanochat_core.runs.directory import RunDirectory, create_run, find_run
from nanochat_core.runs.restore import load_experiment, newest_checkpoint
from nanochat_core.training.resume import (
    check_changes,
    check_version,
    compare_options,
    devices_of,
    explain_horizon,
    find_resume,
)


@attrs.frozen
class Setup:
    """What rank 0 decided, and tells the others.

    Args:
        checkpoint: where to resume from; None for a fresh start.
        weights: checkpoint of ``[train] init_from``.
        distributions: version of each distribution that brought a plugin.
        observers: entry-point name and distribution of each plugin that observes runs.
        allow_other_data: whether a resumed run may go on with data of other fingerprints.
    """

    planned: Planned
    run_dir: RunDirectory
    checkpoint: Path | None
    weights: Path | None
    distributions: dict[str, str]
    observers: tuple[tuple[str, str], ...] = ()
    allow_other_data: bool = False


def prepare(
    file: Path,
    overrides: Sequence[str],
    runs_dir: Path,
    resume: str | None,
    world: World,
    exit_stack: ExitStack,
    allow_other_data: bool = False,
) -> Setup | None:
    """Load and plan, print the plan, choose the run directory. None when there is nothing left to do.

    Args:
        exit_stack: keeps the run directory's lock, from before its checkpoints are looked at.

    Raises:
        NanochatError: when the user has to mend something.
    """
    plugins = load_plugins()
    for failure in plugins.failures:
        print(failure, file=sys.stderr)
    loaded = load(file, overrides, plugins).require_all()
    found = find_resume(resume, loaded.experiment.run.name, runs_dir, exit_stack)
    old = None
    if found is not None:
        check_version(found[1], plugins)
        old = load_experiment(*found, plugins)
    if found is not None and old is not None:  # a run stays as it began, to the last bit
        train, kept = loaded.experiment.train, list[str]()
        if train.compile == "auto":
            kept.append(f"train.compile={str(old.train.compile).lower()}")
        if train.device_batch_size == "auto" and devices_of(found[0]) == (world.size, device_spec(world.device).name):
            kept.append(f"train.device_batch_size={old.train.device_batch_size}")
        loaded = load(file, [*overrides, *kept], plugins).require_all()
    planned = make_plan(loaded, world.size, world.device)
    if planned.problems:
        raise ConfigError(planned.problems)
    experiment = planned.experiment
    observers = tuple((o.plugin, o.distribution) for o in plugins.observers)
    print(f"nanochat run {file}: experiment {experiment.run.name}\n{format_plan(planned)}", flush=True)
    if found is None or old is None:
        weights = None
        if experiment.train.init_from is not None:
            weights = newest_checkpoint(find_run(experiment.train.init_from, runs_dir))
            compare_options(weights, planned)
        run_dir, lock = create_run(runs_dir, experiment.run.name)
        exit_stack.enter_context(lock)
        return Setup(planned, run_dir, None, weights, plugins.versions(), observers)
    run_dir, checkpoint = found
    check_changes(old, planned, run_dir, allow_other_data)
    step = load_state(checkpoint).step
    horizon = planned.plan.num_iterations
    if step > horizon or (step == horizon and run_dir.read_status().get("status") == "finished"):
        print(
            f"{run_dir.path} is already at step {step} of {horizon}: nothing to do. "
            f"To train it further: --set train.num_iterations={2 * step}"
        )
        return None
    print(f"resuming {run_dir.path} from {checkpoint.name}")
    before, now = devices_of(run_dir), (planned.plan.world_size, planned.plan.device)
    if before != now:
        print(
            f"it was trained on {before[0]} x {before[1]}, goes on with {now[0]} x {now[1]}: the data and the global "
            f"batch stay the same, sums may be taken in another order, so that numbers agree within rounding"
        )
    explain_horizon(old, planned, run_dir, step)
    return Setup(planned, run_dir, checkpoint, None, plugins.versions(), observers, allow_other_data)
