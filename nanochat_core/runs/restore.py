"""Loading a run's experiment with the model of a checkpoint, and naming distributions that it needs and that are not
installed."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

from nanochat_core.config.load import LoadedExperiment, Tables, load
from nanochat_core.config.schema import Experiment
from nanochat_core.errors import CheckpointError, ConfigError, PluginError, Problem
from nanochat_core.plugins.choice import Choice
from nanochat_core.plugins.discovery import Plugins
from nanochat_core.plugins.distribution import NAME, current_name
from nanochat_core.runs.checkpoint import read_model, saved_options
from nanochat_core.runs.directory import RunDirectory, list_checkpoints
from nanochat_core.runs.soundness import MANIFEST, read_manifest


def distributions_of(experiment: Experiment) -> dict[str, str]:
    """Version of each distribution whose plugins the experiment uses, except loggers, which loading does not need."""
    parts = (experiment.tokenizer, experiment.data, experiment.model, experiment.optimizer, *experiment.evaluators)
    choices: list[Choice] = [choice for choice in parts if choice.entry is not None]
    return {c.entry.distribution: c.entry.version for c in choices if c.entry is not None and c.entry.distribution}


def missing_distributions(checkpoint: Path) -> list[str]:
    """A line for each distribution that a checkpoint needs and that is not installed."""
    try:
        needed: dict[str, str] = read_manifest(checkpoint).get("plugins", {})
    except (OSError, ValueError):
        return []
    lines = []
    for name, version in sorted(needed.items()):
        if current_name(name) == NAME:
            continue
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"it was made with {name} {version}, which is not installed: pip install {name}=={version}")
    return lines


def load_run(
    run: RunDirectory,
    checkpoint: Path,
    plugins: Plugins,
    overrides: Sequence[str] = (),
    tables: Sequence[Tables] = (),
) -> LoadedExperiment:
    """The experiment of a run. Its model is that of a checkpoint, whatever the defaults are now.

    Args:
        overrides, tables: as ``load`` takes them.

    Raises:
        CheckpointError: when the installed plugin can't build the model.
        ConfigError: with every problem found.
    """
    record = read_model(checkpoint)
    entry = plugins["model"].get(record.plugin)
    options = record.options if entry is None else saved_options(checkpoint, entry)
    model = Tables({"model": {"plugin": record.plugin, **options}}, str(checkpoint / MANIFEST), replace=True)
    return load(run.experiment, overrides, plugins, [model, *tables])


def load_experiment(run: RunDirectory, checkpoint: Path, plugins: Plugins) -> Experiment:
    """The experiment of a run whose plugins are all needed. Its model is that of the checkpoint.

    Raises:
        CheckpointError: when the installed plugin can't build the model.
        ConfigError: when its plugins are not installed, saying what to install.
    """
    try:
        return load_run(run, checkpoint, plugins).require_all().experiment
    except ConfigError as error:
        lines = missing_distributions(checkpoint)
        raise ConfigError([*error.problems, *(Problem("", line, str(run.path)) for line in lines)]) from None


def load_recorded(
    run: RunDirectory, plugins: Plugins, overrides: Sequence[str] = (), tables: Sequence[Tables] = ()
) -> LoadedExperiment:
    """The experiment of a run for uses that don't need its weights. Its model is that of the newest checkpoint, if
    there is one, as the installed plugin may not know the options in the run's file.

    Raises:
        ConfigError: with every problem found.
    """
    for checkpoint in list_checkpoints(run.checkpoints):
        with contextlib.suppress(CheckpointError, PluginError, OSError, ValueError):  # it need not be sound
            return load_run(run, checkpoint, plugins, overrides, tables)
    return load(run.experiment, overrides, plugins, tables)
