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
    """Facts that the factory of an evaluator gets.

    Args:
        tokenizer: the run's.
        world: the ranks; every rank calls ``evaluate`` at the same time.
        max_seq_len: T of the training rows.
        device_batch_size: rows a device handles at once in training.
        rows: ``rows(split, tokens)`` gives this rank's share of the first ``tokens`` tokens of a split (fewer if it
            has fewer), as batches on the device, always [device_batch_size, max_seq_len], filled up with ``IGNORED``.
        time_left: seconds until the entry's ``time_budget`` is used up, infinity without one. Ranks may differ.
        directory: where to keep partial results that should survive an interruption; None: nowhere. Not created.
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
        metrics: metric name to value. An entry renamed in TOML gets its name and a slash in front of each.
        texts: name to text, for people (samples).
        examples: a row for each example, for people who want to look, and for comparisons: ``task``, ``example`` (the
            same for every model, such as a hash), ``value`` (the mean of a task's values is its score, such as 1 for
            right and 0 for wrong), optionally ``centered`` (the same, 0 for a guess), and what else a table can hold.
        files: file name to text: tables to keep besides.
        facts: what else should be recorded, as JSON, such as versions and counts.
        settings: facts that results depend on besides the model, as JSON: numbers of two evaluations compare only where
            these agree, and ``nanochat eval --compare`` says where they don't.
        notes: lines for people.
    """

    metrics: Mapping[str, float] = attrs.field(factory=dict)
    texts: Mapping[str, str] = attrs.field(factory=dict)
    examples: Sequence[Mapping[str, Any]] = ()
    files: Mapping[str, str] = attrs.field(factory=dict)
    facts: Mapping[str, Any] = attrs.field(factory=dict)
    settings: Mapping[str, Any] = attrs.field(factory=dict)
    notes: Sequence[str] = ()


class Evaluator(ABC):
    """Looks at a model. Runs on every rank, the model in eval mode, without gradients; the result of rank 0 counts."""

    @abstractmethod
    def evaluate(self, model: Model, step: int) -> Evaluation: ...
