"""What rank 0 decides before a run is built: the plan, the run directory, what to resume from."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import attrs

from nanochat_core.config.load import DEFAULT, add_places, changed_options, load
from nanochat_core.config.schema import Experiment, fields_of, to_plain
from nanochat_core.distributed.world import World
from nanochat_core.errors import CheckpointError, ConfigError, Problem
from nanochat_core.hardware.machine import device_spec
from nanochat_core.planning.plan import Planned, format_plan, make_plan
from nanochat_core.planning.schedule import lr_multiplier
from nanochat_core.plugins.discovery import Plugins, load_plugins
from nanochat_core.runs.checkpoint import latest_checkpoint, load_state, read_model, remove_leftovers, saved_options
from nanochat_core.runs.directory import RunDirectory, all_runs, create_run, find_run
from nanochat_core.runs.restore import load_experiment


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
    held: ExitStack,
    allow_other_data: bool = False,
) -> Setup | None:
    """Load and plan, print the plan, choose the run directory. None when there is nothing left to do.

    Args:
        held: keeps the run directory's lock, from before its checkpoints are looked at.

    Raises:
        NanochatError: when the user has to mend something.
    """
    plugins = load_plugins()
    for failure in plugins.failures:
        print(failure, file=sys.stderr)
    loaded = load(file, overrides, plugins).require_all()
    found = _find_resume(resume, loaded.experiment.run.name, runs_dir, held)
    old = None
    if found is not None:
        _check_version(found[1], plugins)
        old = load_experiment(*found, plugins)
    if found is not None and old is not None:  # a run stays as it began, to the last bit
        train, kept = loaded.experiment.train, list[str]()
        if train.compile == "auto":
            kept.append(f"train.compile={str(old.train.compile).lower()}")
        if train.device_batch_size == "auto" and _devices(found[0]) == (world.size, device_spec(world.device).name):
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
            _compare_options(weights, planned)
        run_dir, lock = create_run(runs_dir, experiment.run.name)
        held.enter_context(lock)
        return Setup(planned, run_dir, None, weights, plugins.versions(), observers)
    run_dir, checkpoint = found
    _check_changes(old, planned, run_dir, allow_other_data)
    step = load_state(checkpoint).step
    horizon = planned.plan.num_iterations
    if step > horizon or (step == horizon and run_dir.read_status().get("status") == "finished"):
        print(
            f"{run_dir.path} is already at step {step} of {horizon}: nothing to do. "
            f"To train it further: --set train.num_iterations={2 * step}"
        )
        return None
    print(f"resuming {run_dir.path} from {checkpoint.name}")
    before, now = _devices(run_dir), (planned.plan.world_size, planned.plan.device)
    if before != now:
        print(
            f"it was trained on {before[0]} x {before[1]}, goes on with {now[0]} x {now[1]}: the data and the global "
            f"batch stay the same, sums may be taken in another order, so that numbers agree within rounding"
        )
    _explain_horizon(old, planned, run_dir, step)
    return Setup(planned, run_dir, checkpoint, None, plugins.versions(), observers, allow_other_data)


def _devices(run: RunDirectory) -> tuple[int, str]:
    """How many devices of which kind a run was last trained on."""
    plan = json.loads(run.provenance.read_text(encoding="utf-8"))["plan"]
    return plan["world_size"], plan["device"]


def newest_checkpoint(run: RunDirectory) -> Path:
    """The newest sound checkpoint of a run; damaged ones are named on stderr.

    Raises:
        CheckpointError: when there is none.
    """
    checkpoint = _sound_checkpoint(run)
    if checkpoint is None:
        raise CheckpointError(f"{run.path} has no sound checkpoint; set checkpoint.save_every to save on the way")
    return checkpoint


def _sound_checkpoint(run: RunDirectory) -> Path | None:
    checkpoint, damaged = latest_checkpoint(run.checkpoints)
    for line in damaged:
        print(line, file=sys.stderr)
    return checkpoint


def _find_resume(resume: str | None, name: str, runs_dir: Path, held: ExitStack) -> tuple[RunDirectory, Path] | None:
    """The run and checkpoint that ``--resume`` means. The run is locked first: who trains it makes others."""
    if resume is None:
        return None
    if resume not in ("auto", "newest"):
        run = find_run(resume, runs_dir)
        held.enter_context(run.lock())
        return run, newest_checkpoint(run)
    why = f"there is no run of {name!r} under {runs_dir}"
    for newest in all_runs(runs_dir, name)[:1]:
        held.enter_context(newest.lock())
        checkpoint = _sound_checkpoint(newest)
        if checkpoint is not None:
            return newest, checkpoint
        newest.remove_leftovers()  # nobody goes on there
        remove_leftovers(newest.checkpoints)
        why = f"{newest.path} has no sound checkpoint"
    if resume == "newest":
        raise CheckpointError(f"{why}: leave --resume out to start a fresh run, or name an older one")
    print(f"{why}: starting a fresh run")
    return None


def _check_version(checkpoint: Path, plugins: Plugins) -> None:
    """Refuse to resume from an older version of the model: the optimizer's state is that of its parameters."""
    record = read_model(checkpoint)
    entry = plugins["model"].get(record.plugin)
    if entry is not None and record.version < entry.model_version:
        run = checkpoint.parents[1]
        raise CheckpointError(
            f"{checkpoint} has version {record.version} of model {entry.name!r}, {entry.distribution} {entry.version} "
            f"has version {entry.model_version}, and a run can't go on with another: install the "
            f"{entry.distribution} it was made with (its manifest.json says which), or start a fresh run from its "
            f"weights, without --resume and with --set train.init_from={run}"
        )


def _compare_options(weights: Path, planned: Planned) -> None:
    """Name options of the model that are others than those its weights were trained with; refuse one that nobody chose:
    defaults change, weights don't."""
    choice, problems = planned.experiment.model, []
    assert choice.entry is not None
    if read_model(weights).plugin != choice.plugin:
        return
    before, now = saved_options(weights, choice.entry), to_plain(choice.config, keep_none=True)
    for name, field in fields_of(choice.entry.config).items():
        old, new = before.get(name, now[name]), now[name]
        if old == new or field.metadata.get("on_resume") == "free":
            continue
        key = f"model.{name}"
        if planned.origins[key] != DEFAULT:
            print(f"changed from {weights}: {key} was {old!r}, is {new!r}")
            continue
        values = " or ".join(f"--set '{key}={json.dumps(value)}'" for value in (old, new) if value is not None)
        problems.append(Problem(key, f"was {old!r} in {weights}, the default is {new!r}: say which, with {values}"))
    if problems:
        raise ConfigError(problems)


def _check_changes(old: Experiment, planned: Planned, run_dir: RunDirectory, allow_other_data: bool) -> None:
    """Refuse to resume with options that would make it another run; name other changes."""
    problems = []
    for key, before, now, rule in changed_options(old, planned.experiment):
        if rule == "refuse" and allow_other_data and key.startswith("data.") and not key.startswith("data.packing"):
            rule = "warn"
        if rule == "refuse":
            keep = "keep it (leave it out)"
            if before is not None:
                keep = f"keep it (--set '{key}={json.dumps(before)}')"
            elif planned.origins.get(key) == DEFAULT:
                keep = "the old value can't be written in TOML: install the release it was made with,"
            message = f"was {before!r} in {run_dir.path}, is {now!r}: a resumed run can't change it; {keep} "
            problems.append(Problem(key, message + "or start a fresh run without --resume"))
        elif rule == "warn":
            print(f"changed on resume: {key} was {before!r}, is {now!r}")
    if problems:
        error = ConfigError(problems)
        add_places(error, planned.origins)
        raise error


def _explain_horizon(old: Experiment, planned: Planned, run_dir: RunDirectory, step: int) -> None:
    """Say what the learning rate does when a run goes on with another horizon or schedule."""
    new, schedule = planned.plan, planned.experiment.schedule
    old_horizon = run_dir.read_status().get("num_iterations", new.num_iterations)
    if old_horizon == new.num_iterations and old.schedule == schedule:
        return
    before = lr_multiplier(old.schedule, max(step - 1, 0), old_horizon)
    now = lr_multiplier(schedule, step, new.num_iterations)
    warmdown = new.num_iterations - new.warmdown_steps
    print(
        f"the horizon was {old_horizon} steps, is {new.num_iterations}: the learning-rate multiplier goes from "
        f"{before:.3f} at step {step - 1} to {now:.3f} at step {step}, and falls from step {warmdown} "
        f"to {schedule.final_lr_frac:g} at the end"
    )
