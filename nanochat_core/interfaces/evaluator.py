"""The Evaluator interface."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from nanochat_core.distributed.world import World
from nanochat_core.interfaces.model import Model
from nanochat_core.interfaces.tokenizer import Tokenizer
from nanochat_core.interfaces.types import Batch, Split


@attrs.frozen
class EvaluatorContext:
    """The context that the factory of an evaluator receives.

    Args:
        tokenizer: the tokenizer of the run.
        world: the ranks; every rank calls ``evaluate`` at the same time.
        max_seq_len: T of the training rows, in tokens.
        device_batch_size: rows of a micro-batch in training.
        rows: ``rows(split, tokens)`` yields this rank's share of the first ``tokens`` tokens of a split (or of all, if
            it has fewer), as batches on the device. Each is [device_batch_size, max_seq_len], padded with ``IGNORED``.
        time_left: returns the seconds until the entry's ``time_budget`` is used up, infinity without one. Ranks may
            differ.
        directory: directory for partial results that should survive an interruption, not yet created; None: keep none.
    """

    tokenizer: Tokenizer
    world: World
    max_seq_len: int
    device_batch_size: int
    rows: Callable[[Split, int], Iterator[Batch]]
    time_left: Callable[[], float] = lambda: math.inf
    directory: Path | None = None


@attrs.frozen
class Evaluation:
    """The results of one evaluation.

    Args:
        metrics: metric name to value. If an entry has a name of its own, the core adds the name and a slash in front.
        texts: name to text, for people to read, such as samples.
        examples: a row for each example, for inspection and for comparisons: ``task``, ``example`` (an identifier that
            is the same for every model, such as a hash), ``value`` (the mean over a task is its score, such as 1 for
            right and 0 for wrong), optionally ``centered`` (the value scaled so that guessing gives 0), and any further
            columns of a table.
        files: file name to text of further files to keep.
        facts: further facts to record, as JSON, such as versions and counts.
        settings: facts besides the model on which results depend, as JSON. Two evaluations are comparable only if these
            are equal; ``nanochat eval --compare`` warns about differences.
        notes: lines for people to read.
    """

    metrics: Mapping[str, float] = attrs.field(factory=dict)
    texts: Mapping[str, str] = attrs.field(factory=dict)
    examples: Sequence[Mapping[str, Any]] = ()
    files: Mapping[str, str] = attrs.field(factory=dict)
    facts: Mapping[str, Any] = attrs.field(factory=dict)
    settings: Mapping[str, Any] = attrs.field(factory=dict)
    notes: Sequence[str] = ()


class Evaluator(ABC):
    """An evaluation of a model, such as a validation loss, a benchmark, or samples."""

    @abstractmethod
    def evaluate(self, model: Model, step: int) -> Evaluation:
        """Evaluate ``model`` after ``step`` optimizer steps.

        Called on every rank at the same time, with the model in eval mode and without gradients. The result of rank 0
        is used.
        """
