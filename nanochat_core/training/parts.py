"""The parts of a run on one rank, as the training loop gets them."""

from __future__ import annotations

from collections.abc import Collection

import attrs

from nanochat_core.data.loader import TrainLoader
from nanochat_core.evaluation.evaluate import Evaluations
from nanochat_core.interfaces.data_source import DataSource
from nanochat_core.interfaces.model import Model
from nanochat_core.interfaces.optimizer import Optimizer
from nanochat_core.runs.state import TrainState


@attrs.frozen
class Parts:
    """What a run is made of, built on this rank; see ``build.build_parts``.

    Args:
        model: on its device, with its weights, the same on every rank.
        optimizer: of the model, with its state.
        source: the data source.
        loader: this rank's training steps.
        evaluations: the evaluators of the run.
        state: where the run stands; it changes with every step.
        evaluated: names of entries that evaluated the step at which the run starts, before it was interrupted.
    """

    model: Model
    optimizer: Optimizer
    source: DataSource
    loader: TrainLoader
    evaluations: Evaluations
    state: TrainState
    evaluated: Collection[str] = ()
