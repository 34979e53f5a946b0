"""The parts of a run on one rank, which the training loop uses."""

from __future__ import annotations

from collections.abc import Collection

import attrs

from nanochat_core.data.loader import TrainLoader
from nanochat_core.evaluation.evaluate import Evaluations
from nanochat_core.interfaces.data_source import DataSource
from nanochat_core.interfaces.model import Model
from nanochat_core.interfaces.optimizer import Optimizer
from nanochat_core.interfaces.tokenizer import Tokenizer
from nanochat_core.runs.state import TrainState


@attrs.frozen
class Parts:
    """The parts of a run on this rank, which ``build.build_parts`` builds.

    Args:
        model: on its device, with its weights, the same on every rank.
        optimizer: of the model, with its state.
        source: the data source.
        tokenizer: of the run.
        loader: this rank's training data, step by step.
        evaluations: the evaluators of the run.
        state: progress of the run; it changes with every step.
        evaluated: names of evaluator entries that had evaluated the first step before the run was interrupted.
    """

    model: Model
    optimizer: Optimizer
    source: DataSource
    tokenizer: Tokenizer
    loader: TrainLoader
    evaluations: Evaluations
    state: TrainState
    evaluated: Collection[str] = ()
