"""Resuming a run: which run and checkpoint, and which changes of the experiment are allowed."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

from nanochat_core.config.origins import DEFAULT, add_places
from nanochat_core.config.schema import Experiment
from nanochat_core.config.tables import changed_options
from nanochat_core.errors import CheckpointError, ConfigError, Problem
from nanochat_core.evaluation.trained_model import newest_checkpoint, usable_checkpoint
from nanochat_core.planning.plan import Planned
from nanochat_core.planning.schedule import lr_multiplier
from nanochat_core.plugins.discovery import Plugins
from nanochat_core.plugins.structure import fields_of, to_plain
from nanochat_core.runs.checkpoint import read_model, remove_leftovers, saved_options
from nanochat_core.runs.directory import RunDirectory, all_runs, find_run
from nanochat_core.runs.lock import RunLock


def devices_of(run: RunDirectory) -> tuple[int, str] | None:
    """Return the number and the name of the devices that a run was last trained on; None when the run does not say."""
    plan = run.read_provenance().get("plan", {})
    size, device = plan.get("world_size"), plan.get("device")
    return (size, device) if isinstance(size, int) and isinstance(device, str) else None


def find_resume(
    resume: str | None, name: str, runs_dir: Path, exit_stack: ExitStack, plugins: Plugins
) -> tuple[RunDirectory, Path, RunLock] | None:
    """Return the run and the checkpoint that ``--resume`` refers to, and its lock; None for a fresh run.

    The run is locked first, because a process that trains it would write further checkpoints.
    """
    if resume is None:
        return None
    if resume not in ("auto", "newest"):
        run = find_run(resume, runs_dir)
        lock = exit_stack.enter_context(run.lock())
        return run, newest_checkpoint(run, plugins), lock
    why = f"there is no run of {name!r} under {runs_dir}"
    for newest in all_runs(runs_dir, name)[:1]:
        lock = exit_stack.enter_context(newest.lock())
        checkpoint = usable_checkpoint(newest, plugins)
        if checkpoint is not None:
            return newest, checkpoint, lock
        newest.remove_leftovers()  # no run continues there
        remove_leftovers(newest.checkpoints)
        why = f"{newest.path} has no sound checkpoint"
    if resume == "newest":
        raise CheckpointError(f"{why}: omit --resume to start a fresh run, or name an older run")
    print(f"{why}: starting a fresh run")
    return None


def check_version(checkpoint: Path, plugins: Plugins) -> None:
    """Refuse to resume from an older version of the model: the optimizer's state belongs to the old parameters."""
    record = read_model(checkpoint)
    entry = plugins["model"].get(record.plugin)
    if entry is not None and record.version < entry.model_version.number:
        run = checkpoint.parents[1]
        raise CheckpointError(
            f"{checkpoint} has version {record.version} of model {entry.name!r}, {entry.distribution} {entry.version} "
            f"has version {entry.model_version.number}, and a run can't continue with a different version: install "
            f"the {entry.distribution} that it was made with (see its manifest.json), or start a fresh run from its "
            f"weights, without --resume and with --set train.init_from={run}"
        )


def compare_options(weights: Path, planned: Planned) -> None:
    """Print the options of the model that differ from those that its weights were trained with.

    Refuse an option that differs because a default has changed, which nobody chose.
    """
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
        problems.append(Problem(key, f"was {old!r} in {weights}, the default is {new!r}: choose one with {values}"))
    if problems:
        raise ConfigError(problems)


def check_changes(old: Experiment, planned: Planned, run_dir: RunDirectory, allow_other_data: bool) -> None:
    """Refuse changes of options that a resumed run must keep; print other changes that matter."""
    problems = []
    for key, before, now, rule in changed_options(old, planned.experiment):
        if rule == "refuse" and allow_other_data and key.startswith("data.") and not key.startswith("data.packing"):
            rule = "warn"
        if rule == "refuse":
            keep = "keep it (omit the key)"
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


def explain_horizon(old: Experiment, planned: Planned, run_dir: RunDirectory, step: int) -> None:
    """Print how the learning rate continues when a run is resumed with a different horizon or schedule."""
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
