"""The trained model of a run or of a checkpoint, with its tokenizer."""

from __future__ import annotations

from pathlib import Path

import attrs
import torch

from nanochat_core.config.schema import Experiment
from nanochat_core.data.tokenizer_cache import load_tokenizer
from nanochat_core.hardware.casting import dtype_of
from nanochat_core.interfaces.model import Model
from nanochat_core.interfaces.tokenizer import Tokenizer
from nanochat_core.planning.build import build_model
from nanochat_core.plugins.discovery import Plugins
from nanochat_core.runs.checkpoint import load_model_tensors, saved_tensors
from nanochat_core.runs.directory import RunDirectory, find_run
from nanochat_core.runs.restore import load_experiment, newest_checkpoint
from nanochat_core.runs.trust import require_trust


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
    """Load the model and tokenizer of a run's newest valid checkpoint, on ``device``, in eval mode.

    Args:
        trusted: load a run that is not under ``runs_dir`` without asking; see ``require_trust``.

    Raises:
        CheckpointError: when there is no such run or checkpoint.
        ConfigError: when its plugins are not installed, or it is not trusted.
    """
    run = find_run(reference, runs_dir)
    checkpoint = newest_checkpoint(run)
    experiment = load_experiment(run, checkpoint, plugins)
    used = {"tokenizer": experiment.tokenizer, "model": experiment.model}
    require_trust(run, runs_dir, "nanochat sample", used, trusted=trusted)
    return open_trained(run, checkpoint, experiment, device)


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
    return TrainedModel(model.to(device).eval(), tokenizer, experiment, dtype_of(train.dtype), checkpoint)
