"""Construction of the evaluators of an experiment."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from nanochat_core.config.schema import Experiment
from nanochat_core.data.validation import ValidationRows
from nanochat_core.distributed.guarded import EvaluationWorld
from nanochat_core.distributed.world import World
from nanochat_core.errors import DataError
from nanochat_core.evaluation.evaluate import BuiltEvaluator
from nanochat_core.files import shorten
from nanochat_core.interfaces.data_source import DataSource
from nanochat_core.interfaces.evaluator import Evaluator, EvaluatorContext
from nanochat_core.interfaces.tokenizer import Tokenizer
from nanochat_core.interfaces.types import Batch, Split
from nanochat_core.plugins.choice import Choice


def rows_of(
    source: Callable[[], DataSource], tokenizer: Tokenizer, max_seq_len: int, device_batch_size: int, world: World
) -> Callable[[Split, int], Iterator[Batch]]:
    """Return the function ``EvaluatorContext.rows``. It tokenizes rows on first use and keeps them; ``source`` is
    called only then.
    """
    known: dict[tuple[Split, int], ValidationRows] = {}

    def rows(split: Split, tokens: int) -> Iterator[Batch]:
        if (split, tokens) not in known:
            documents: Sequence[str] = source().documents(split)
            if not len(documents):
                raise DataError(f"the data source has no {split} documents: change the options of [data]")
            known[split, tokens] = ValidationRows(
                documents,
                tokenizer,
                tokens=tokens,
                max_seq_len=max_seq_len,
                device_batch_size=device_batch_size,
                rank=world.rank,
                world_size=world.size,
            )
        for batch in known[split, tokens]:
            yield batch.to(world.device)

    return rows


def build_evaluators(
    choices: Sequence[Choice],
    source: Callable[[], DataSource],
    fingerprint: Callable[[Split], str],
    tokenizer: Tokenizer,
    experiment: Experiment,
    world: EvaluationWorld,
    directory: Path,
) -> tuple[BuiltEvaluator, ...]:
    """Build an evaluator for each of ``choices``.

    Args:
        source: returns the data source; called only when an evaluator reads rows.
        fingerprint: returns the fingerprint of a split of the data source.
        directory: directory in which evaluations are kept.

    Raises:
        PluginError: when a factory does not return an Evaluator.
    """
    T, B = experiment.train.max_seq_len, experiment.train.device_batch_size
    assert B != "auto", "the plan has resolved the option"
    rows = rows_of(source, tokenizer, T, B, world)

    def build(choice: Choice) -> BuiltEvaluator:
        data: dict[str, str] = {}

        def noted_rows(split: Split, tokens: int) -> Iterator[Batch]:
            if world.is_main:
                data[split] = fingerprint(split)
            return rows(split, tokens)

        kept = directory / f".{choice.name}"
        evaluator = choice.build(EvaluatorContext(tokenizer, world, T, B, noted_rows, world.time_left, kept))
        if not isinstance(evaluator, Evaluator):
            raise choice.breaks(f"the factory must return a nanochat_core.Evaluator, not {shorten(evaluator)}")
        return BuiltEvaluator(choice, evaluator, data)

    return tuple(build(choice) for choice in choices)
