"""The trained model of a run or of a checkpoint, with its tokenizer."""

from __future__ import annotations

import sys
from pathlib import Path

import attrs
import torch

from nanochat_core.config.schema import Experiment
from nanochat_core.data.tokenizer_cache import load_tokenizer
from nanochat_core.errors import CheckpointError, ConfigError, NanochatError
from nanochat_core.files import first_few, shorten
from nanochat_core.hardware.machine import compute_dtype
from nanochat_core.interfaces.model import Model
from nanochat_core.interfaces.tokenizer import Tokenizer
from nanochat_core.planning.build import build_model
from nanochat_core.plugins.choice import Choice
from nanochat_core.plugins.discovery import Plugins
from nanochat_core.runs.checkpoint import (
    load_model_tensors,
    model_tensors,
    read_model,
    saved_tensors,
    verified_checkpoints,
)
from nanochat_core.runs.directory import RunDirectory, find_run
from nanochat_core.runs.restore import load_experiment, load_recorded, load_run
from nanochat_core.runs.soundness import MANIFEST, misfits, part_file, shapes_in, shapes_of
from nanochat_core.runs.trust import require_trust

META = torch.device("meta")


@attrs.frozen
class TrainedModel:
    """A trained model with its tokenizer.

    Args:
        dtype: dtype of matrix products.
        checkpoint: directory from which the model was loaded.
    """

    model: Model
    tokenizer: Tokenizer
    experiment: Experiment
    dtype: torch.dtype
    checkpoint: Path


def load_trained(
    reference: str, runs_dir: Path, device: torch.device, plugins: Plugins, trusted: bool = False
) -> TrainedModel:
    """Load the model and tokenizer of a run's newest usable checkpoint, on ``device``, in eval mode.

    Args:
        trusted: load a run that is not under ``runs_dir`` without asking; see ``require_trust``.

    Raises:
        CheckpointError: when there is no such run or checkpoint.
        ConfigError: when its plugins are not installed, or it is not trusted.
    """
    run = find_run(reference, runs_dir)

    def used() -> dict[str, Choice]:
        recorded = load_recorded(run, plugins).experiment
        return {"tokenizer": recorded.tokenizer, "model": recorded.model}

    require_trust(run, runs_dir, "nanochat sample", used, trusted=trusted)
    checkpoint = newest_checkpoint(run, plugins)
    return open_trained(run, checkpoint, load_experiment(run, checkpoint, plugins), device)


def newest_checkpoint(run: RunDirectory, plugins: Plugins) -> Path:
    """The newest usable checkpoint of a run; others are named on stderr.

    Raises:
        CheckpointError: when there is none.
    """
    checkpoint = usable_checkpoint(run, plugins)
    if checkpoint is None:
        raise CheckpointError(f"{run.path} has no sound checkpoint; set checkpoint.save_every to save during training")
    return checkpoint


def usable_checkpoint(run: RunDirectory, plugins: Plugins) -> Path | None:
    """The newest checkpoint of a run that is sound and fits the model that it says it is of; None without one. Newer
    ones are named on stderr."""
    for checkpoint, damage in verified_checkpoints(run.checkpoints):
        problem = damage or misfit(run, checkpoint, plugins)
        if not problem:
            return checkpoint
        print(f"{checkpoint}: {problem}; it is skipped", file=sys.stderr)
    return None


def misfit(run: RunDirectory, checkpoint: Path, plugins: Plugins) -> str:
    """Why the tensors of a sound checkpoint are not those of the model that its manifest describes; empty if they are,
    or if that can't be told now, since something is not installed or the checkpoint is of another version of the model.

    The model is built on the meta device: wrong options may describe one that is too large for any memory.
    """
    try:
        record = read_model(checkpoint)
        entry = plugins["model"].get(record.plugin)
        if entry is None or entry.model_version.number != record.version:
            return ""
        loaded = load_run(run, checkpoint, plugins)
        experiment = loaded.experiment
        if any(choice.entry is None for choice in (experiment.model, experiment.tokenizer)):
            return ""
        tokenizer = load_tokenizer(experiment.tokenizer, run.tokenizer)
    except ConfigError as error:
        wrong = [problem for problem in error.problems if problem.where.endswith(MANIFEST)]
        return f"{MANIFEST} has wrong options of the model ({wrong[0].key}: {wrong[0].message})" if wrong else ""
    except NanochatError:
        return ""  # told by who needs it
    try:
        size, train = tokenizer.vocab_size, experiment.train
        model = build_model(experiment.model, train, size, META, for_training=False, built_on=META)
    except NanochatError as error:
        reason = shorten(str(error).splitlines()[0], 300)[1:-1]
        return f"no model can be built from the options in {MANIFEST} ({reason})"
    problems = misfits(shapes_in(checkpoint / part_file("model")), shapes_of(model_tensors(model)))
    return f"its tensors do not fit the options in {MANIFEST}: {first_few(problems, 4, '; ')}" if problems else ""


def open_trained(run: RunDirectory, checkpoint: Path, experiment: Experiment, device: torch.device) -> TrainedModel:
    """Load the model and tokenizer of a given checkpoint of a run, on ``device``, in eval mode.

    Args:
        experiment: the experiment with the options of the checkpoint, as ``load_run`` returns it.
    """
    tokenizer = load_tokenizer(experiment.tokenizer, run.tokenizer)
    train = experiment.train
    model = build_model(experiment.model, train, tokenizer.vocab_size, device, for_training=False)
    assert experiment.model.entry is not None
    load_model_tensors(model, saved_tensors(checkpoint, experiment.model.entry), str(checkpoint))
    return TrainedModel(model.to(device).eval(), tokenizer, experiment, compute_dtype(train.dtype, device), checkpoint)
