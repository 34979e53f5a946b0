"""What rank 0 decides before a run is built: the plan, the run directory, and what to resume from."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import attrs

from nanochat_core.config.load import LoadedExperiment
from nanochat_core.config.schema import Experiment
from nanochat_core.distributed.world import World
from nanochat_core.errors import ConfigError
from nanochat_core.hardware.machine import device_spec
from nanochat_core.planning.banner import format_plan
from nanochat_core.planning.plan import Planned
from nanochat_core.planning.planner import make_plan
from nanochat_core.plugins.discovery import Plugins
from nanochat_core.runs.checkpoint import load_state
from nanochat_core.runs.directory import RunDirectory, create_run, find_run
from nanochat_core.runs.restore import load_experiment, newest_checkpoint
from nanochat_core.training.request import RunRequest
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
    request: RunRequest, plugins: Plugins, loaded: LoadedExperiment, world: World, exit_stack: ExitStack
) -> Setup | None:
    """Plan the run, print the plan, and choose the run directory. None when there is nothing left to do.

    Args:
        exit_stack: keeps the run directory's lock, from before its checkpoints are looked at.

    Raises:
        NanochatError: when the user has to mend something.
    """
    for failure in plugins.failures:
        print(failure, file=sys.stderr)
    found = find_resume(request.resume, loaded.experiment.run.name, request.runs_dir, exit_stack)
    old = None
    if found is not None:
        run_dir, checkpoint = found
        check_version(checkpoint, plugins)
        old = load_experiment(run_dir, checkpoint, plugins)
        loaded = _as_it_began(loaded, old, run_dir, world)
    planned = make_plan(loaded, world.size, world.device)
    if planned.problems:
        raise ConfigError(planned.problems)
    print(f"nanochat run {request.file}: experiment {planned.experiment.run.name}\n{format_plan(planned)}", flush=True)
    distributions, observers = plugins.versions(), tuple((o.plugin, o.distribution) for o in plugins.observers)
    if found is None or old is None:
        weights = _initial_weights(planned, request.runs_dir)
        run_dir, lock = create_run(request.runs_dir, planned.experiment.run.name)
        exit_stack.enter_context(lock)
        return Setup(planned, run_dir, None, weights, distributions, observers)
    check_changes(old, planned, run_dir, request.allow_other_data)
    if _is_done(planned, run_dir, checkpoint):
        return None
    _explain_resume(old, planned, run_dir, checkpoint)
    return Setup(planned, run_dir, checkpoint, None, distributions, observers, request.allow_other_data)


def _as_it_began(loaded: LoadedExperiment, old: Experiment, run_dir: RunDirectory, world: World) -> LoadedExperiment:
    """The experiment with what "auto" became when the run began, where another choice would give other bits."""
    kept: dict[str, object] = {}
    if loaded.experiment.train.compile == "auto":
        kept["train.compile"] = old.train.compile
    same_devices = devices_of(run_dir) == (world.size, device_spec(world.device).name)
    if loaded.experiment.train.device_batch_size == "auto" and same_devices:
        kept["train.device_batch_size"] = old.train.device_batch_size
    return loaded.keep(kept, str(run_dir.path))


def _initial_weights(planned: Planned, runs_dir: Path) -> Path | None:
    """The checkpoint that ``[train] init_from`` means."""
    reference = planned.experiment.train.init_from
    if reference is None:
        return None
    weights = newest_checkpoint(find_run(reference, runs_dir))
    compare_options(weights, planned)
    return weights


def _is_done(planned: Planned, run_dir: RunDirectory, checkpoint: Path) -> bool:
    """Whether the run is already at its horizon; says so."""
    step, horizon = load_state(checkpoint).step, planned.plan.num_iterations
    if step < horizon or (step == horizon and run_dir.read_status().get("status") != "finished"):
        return False
    print(
        f"{run_dir.path} is already at step {step} of {horizon}: nothing to do. "
        f"To train it further: --set train.num_iterations={2 * step}"
    )
    return True


def _explain_resume(old: Experiment, planned: Planned, run_dir: RunDirectory, checkpoint: Path) -> None:
    """Say what is resumed, and what differs from before."""
    print(f"resuming {run_dir.path} from {checkpoint.name}")
    before, now = devices_of(run_dir), (planned.plan.world_size, planned.plan.device)
    if before != now:
        print(
            f"it was trained on {before[0]} x {before[1]}, goes on with {now[0]} x {now[1]}: the data and the global "
            f"batch stay the same, sums may be taken in another order, so that numbers agree within rounding"
        )
    explain_horizon(old, planned, run_dir, load_state(checkpoint).step)
