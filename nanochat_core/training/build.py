"""Building the parts of a run from an experiment's choices, and checking each plugin's side of the contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import attrs
import torch

from nanochat_core.config.schema import Choice, DataSourceKeys, Experiment
from nanochat_core.data import packing
from nanochat_core.data.loader import TrainLoader, ValidationRows
from nanochat_core.data.token_cache import open_cache
from nanochat_core.data.tokenizer_cache import load_tokenizer
from nanochat_core.distributed.world import World
from nanochat_core.errors import DataError, PluginError
from nanochat_core.evaluation.evaluate import BuiltEvaluator, EvaluationWorld
from nanochat_core.files import cache_dir
from nanochat_core.interfaces.model import (
    Batch,
    DataContext,
    DataSource,
    Evaluator,
    EvaluatorContext,
    Model,
    ModelContext,
    Optimizer,
    Split,
    Tokenizer,
)
from nanochat_core.planning.plan import Plan, build_model, optimizer_context
from nanochat_core.plugins.discovery import load_plugins
from nanochat_core.runs.checkpoint import load_model_tensors, saved_tensors
from nanochat_core.runs.directory import RunDirectory, find_run
from nanochat_core.runs.restore import load_experiment
from nanochat_core.runs.state import TrainState
from nanochat_core.training.prepare import newest_checkpoint

MOST_TO_COUNT = 2**31  # bytes of text that are read only to count them


def build_source(choice: Choice) -> DataSource:
    """The data source."""
    source = choice.build(DataContext(cache_dir=cache_dir()))
    if not isinstance(source, DataSource):
        raise PluginError(f"the factory of data source {choice.plugin!r} must return a nanochat_core.DataSource")
    return source


def build_optimizer(choice: Choice, model: Model, plan: Plan, world: World) -> Optimizer:
    """The optimizer of ``model``."""
    context = optimizer_context(model, world, plan.total_batch_size, plan.num_iterations, plan.relative_data)
    optimizer = choice.build(context)
    if not isinstance(optimizer, Optimizer):
        raise PluginError(f"the factory of optimizer {choice.plugin!r} must return a nanochat_core.Optimizer")
    return optimizer


def allowed_epochs(keys: DataSourceKeys) -> int | None:
    """Passes over the training data that a run may make, None for any number."""
    if keys.epochs == "repeat":
        return None
    return 1 if keys.epochs == "error" else keys.epochs


def _check_epochs(keys: DataSourceKeys, plan: Plan, source: DataSource) -> None:
    """Refuse a run that is sure to use the data up: a token has at least one byte. The source knows its bytes only
    roughly, so where they seem too few, and aren't too many to look at, they are counted."""
    epochs, estimate = allowed_epochs(keys), source.describe().get("text_bytes")
    if epochs is None or not isinstance(estimate, int) or estimate > MOST_TO_COUNT:
        return
    documents = source.documents("train")
    needed = -(-plan.total_tokens // epochs) - len(documents)  # one token of each document is bos
    if estimate >= needed:
        return
    counted = 0
    for document in documents:
        counted += len(document.encode(errors="replace"))
        if counted >= needed:
            return
    raise DataError(
        f"data.epochs: the run needs {plan.total_tokens:,} tokens, more than there are in {counted:,} bytes of "
        f"training text read {epochs} times: give more data, train for fewer steps, or set data.epochs to "
        f'"repeat" or a higher number'
    )


def build_loader(
    choice: Choice, source: DataSource, tokenizer: Tokenizer, plan: Plan, state: TrainState, world: World
) -> TrainLoader:
    """This rank's training steps from ``state`` on; pins the number of lanes in a fresh state.

    Raises:
        DataError: when the data can't be enough for the plan; see ``[data] epochs``.
    """
    keys, documents = choice.keys, source.documents("train")
    assert isinstance(keys, DataSourceKeys)
    world.on_main(lambda: _check_epochs(keys, plan, source))
    if not state.lanes:
        state.lanes = packing.lanes(plan.rows_per_step, len(documents), keys.packing, keys.packing_window)
    tokens: packing.TokenSource = packing.Encoder(documents, tokenizer)
    if keys.cache:
        tokens = open_cache(cache_dir(), tokens, source.fingerprint("train"), tokenizer)
    return TrainLoader(
        tokens,
        rows_per_step=plan.rows_per_step,
        lanes=state.lanes,
        max_seq_len=plan.max_seq_len,
        device_batch_size=plan.device_batch_size,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
        cursors={lane: packing.Cursor(*cursor) for lane, cursor in state.cursors.items()} or None,
        packing=keys.packing,
        window=keys.packing_window,
        epochs=allowed_epochs(keys),
        threads=keys.threads,
    )


def rows_of(
    source: Callable[[], DataSource], tokenizer: Tokenizer, max_seq_len: int, device_batch_size: int, world: World
) -> Callable[[Split, int], Iterator[Batch]]:
    """``EvaluatorContext.rows``: tokenized on first use, then kept. Only then the source is asked for."""
    known: dict[tuple[Split, int], ValidationRows] = {}

    def rows(split: Split, tokens: int) -> Iterator[Batch]:
        if (split, tokens) not in known:
            documents: Sequence[str] = source().documents(split)
            if not len(documents):
                raise DataError(f"the data source has no {split} documents; see the options of [data]")
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
    """The evaluators.

    Args:
        source: gives the data source; asked only when an evaluator reads rows.
        fingerprint: of a split of it.
        directory: where evaluations are kept.
    """
    T, B = experiment.train.max_seq_len, experiment.train.device_batch_size
    assert B != "auto", "the plan has resolved it"
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
            raise PluginError(f"the factory of evaluator {choice.plugin!r} must return a nanochat_core.Evaluator")
        return BuiltEvaluator(choice, evaluator, data)

    return tuple(build(choice) for choice in choices)


@attrs.frozen
class TrainedModel:
    """A model of a run with its tokenizer."""

    model: Model
    tokenizer: Tokenizer
    experiment: Experiment
    dtype: torch.dtype
    checkpoint: Path


def load_trained(reference: str, runs_dir: Path, device: torch.device) -> TrainedModel:
    """The model and tokenizer of a run's newest sound checkpoint, on ``device``, in eval mode.

    Raises:
        CheckpointError: when there is no such run or checkpoint.
        ConfigError: when its plugins are not installed.
    """
    run = find_run(reference, runs_dir)
    checkpoint = newest_checkpoint(run)
    return open_trained(run, checkpoint, load_experiment(run, checkpoint, load_plugins()), device)


def open_trained(run: RunDirectory, checkpoint: Path, experiment: Experiment, device: torch.device) -> TrainedModel:
    """The model of one checkpoint of a run; ``experiment`` has the checkpoint's options, see ``load_run``."""
    tokenizer = load_tokenizer(experiment.tokenizer, run.tokenizer)
    dtype: torch.dtype = getattr(torch, experiment.train.dtype)
    context = ModelContext(tokenizer.vocab_size, experiment.train.max_seq_len, device, dtype)
    model = build_model(experiment.model, context, torch.device("cpu"))
    assert experiment.model.entry is not None
    load_model_tensors(model, saved_tensors(checkpoint, experiment.model.entry), str(checkpoint))
    return TrainedModel(model.to(device).eval(), tokenizer, experiment, dtype, checkpoint)
