"""Decisions of rank 0 before a run is built: the plan, the run directory, and the checkpoint to resume from."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import attrs

from nanochat_core.config.load import LoadedExperiment
from nanochat_core.config.schema import Experiment
from nanochat_core.distributed.world import World
from nanochat_core.errors import ConfigError
from nanochat_core.evaluation.trained_model import newest_checkpoint
from nanochat_core.hardware.machine import device_spec
from nanochat_core.planning.banner import format_plan
from nanochat_core.planning.plan import Planned
from nanochat_core.planning.planner import make_plan
from nanochat_core.plugins.discovery import Plugins
from nanochat_core.runs.checkpoint import load_state
from nanochat_core.runs.directory import RunDirectory, create_run, find_run
from nanochat_core.runs.lock import RunLock
from nanochat_core.runs.restore import load_experiment
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
    """The decisions of rank 0, which it sends to the other ranks.

    Args:
        checkpoint: checkpoint to resume from; None for a fresh run.
        weights: checkpoint that ``[train] init_from`` refers to; None without one.
        distributions: version of each distribution that provides a plugin, by name.
        observers: entry-point name and distribution of each plugin that observes runs.
        allow_other_data: whether a resumed run may continue with data of different fingerprints.
        lock: of the run directory, on rank 0; None on others.
    """

    planned: Planned
    run_dir: RunDirectory
    checkpoint: Path | None
    weights: Path | None
    distributions: dict[str, str]
    observers: tuple[tuple[str, str], ...] = ()
    allow_other_data: bool = False
    lock: RunLock | None = None

    def fresh_in(self, run_dir: RunDirectory) -> Setup:
        """Return the same for a run that begins in ``run_dir``."""
        return attrs.evolve(self, run_dir=run_dir, checkpoint=None)


def prepare(
    request: RunRequest, plugins: Plugins, loaded: LoadedExperiment, world: World, exit_stack: ExitStack
) -> Setup | None:
    """Plan the run, print the plan, and choose the run directory. Return None when there is nothing left to do.

    Args:
        exit_stack: holds the lock of the run directory, which is taken before its checkpoints are read.

    Raises:
        NanochatError: for an error that the user can correct.
    """
    for failure in plugins.failures:
        print(failure, file=sys.stderr)
    resumed = find_resume(request.resume, loaded.experiment.run.name, request.runs_dir, exit_stack, plugins)
    old = None
    if resumed is not None:
        run_dir, checkpoint, lock = resumed
        check_version(checkpoint, plugins)
        old = load_experiment(run_dir, checkpoint, plugins)
        loaded = _as_it_began(loaded, old, run_dir, world)
    planned = make_plan(loaded, world.size, world.device)
    if planned.problems:
        raise ConfigError(planned.problems)
    print(f"nanochat run {request.file}: experiment {planned.experiment.run.name}\n{format_plan(planned)}", flush=True)
    distributions, observers = plugins.versions(), tuple((o.plugin, o.distribution) for o in plugins.observers)
    if resumed is None or old is None:
        weights = _initial_weights(planned, request.runs_dir, plugins)
        run_dir, lock = create_run(request.runs_dir, planned.experiment.run.name)
        exit_stack.enter_context(lock)
        return Setup(planned, run_dir, None, weights, distributions, observers, lock=lock)
    check_changes(old, planned, run_dir, request.allow_other_data)
    if _is_done(planned, run_dir, checkpoint):
        return None
    _explain_resume(old, planned, run_dir, checkpoint)
    return Setup(planned, run_dir, checkpoint, None, distributions, observers, request.allow_other_data, lock)


def _as_it_began(loaded: LoadedExperiment, old: Experiment, run_dir: RunDirectory, world: World) -> LoadedExperiment:
    """Return the experiment with the values that "auto" had when the run began, where others would change results."""
    kept: dict[str, object] = {}
    if loaded.experiment.train.compile == "auto":
        kept["train.compile"] = old.train.compile
    same_devices = devices_of(run_dir) == (world.size, device_spec(world.device).name)
    if loaded.experiment.train.device_batch_size == "auto" and same_devices:
        kept["train.device_batch_size"] = old.train.device_batch_size
    return loaded.keep(kept, str(run_dir.path))


def _initial_weights(planned: Planned, runs_dir: Path, plugins: Plugins) -> Path | None:
    """Return the checkpoint that ``[train] init_from`` refers to; None without one."""
    reference = planned.experiment.train.init_from
    if reference is None:
        return None
    weights = newest_checkpoint(find_run(reference, runs_dir), plugins)
    compare_options(weights, planned)
    return weights


def _is_done(planned: Planned, run_dir: RunDirectory, checkpoint: Path) -> bool:
    """Whether the run is already at its horizon; if so, print that."""
    step, horizon = load_state(checkpoint).step, planned.plan.num_iterations
    if step < horizon or (step == horizon and run_dir.read_status().get("status") != "finished"):
        return False
    print(
        f"{run_dir.path} is already at step {step} of {horizon}: nothing to do. "
        f"To train it further: --set train.num_iterations={2 * step}"
    )
    return True


def _explain_resume(old: Experiment, planned: Planned, run_dir: RunDirectory, checkpoint: Path) -> None:
    """Print what is resumed, and what differs from before."""
    print(f"resuming {run_dir.path} from {checkpoint.name}")
    before, now = devices_of(run_dir), (planned.plan.world_size, planned.plan.device)
    if before is not None and before != now:
        print(
            f"it was trained on {before[0]} x {before[1]} and continues on {now[0]} x {now[1]}: the data and the "
            f"global batch stay the same; the order of sums may change, so that results agree within rounding"
        )
    explain_horizon(old, planned, run_dir, load_state(checkpoint).step)
