"""Building the parts of a run from an experiment's choices, and checking each plugin's side of the contract."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import attrs
import torch

from nanochat_core.checkpoint import load_model_tensors, load_weights
from nanochat_core.distributed import World
from nanochat_core.errors import DataError, PluginError
from nanochat_core.interfaces import (
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
    TokenizerContext,
)
from nanochat_core.load import load
from nanochat_core.loader import ValidationRows
from nanochat_core.paths import cache_dir
from nanochat_core.plan import Plan, build_model, optimizer_context
from nanochat_core.plugins import load_plugins
from nanochat_core.prepare import newest_checkpoint
from nanochat_core.rundir import find_run
from nanochat_core.schema import Choice, Experiment


def build_source(choice: Choice) -> DataSource:
    """The data source."""
    source = choice.build(DataContext(cache_dir=cache_dir()))
    if not isinstance(source, DataSource):
        raise PluginError(f"the factory of data source {choice.plugin!r} must return a nanochat_core.DataSource")
    return source


def train_tokenizer(choice: Choice, source: DataSource, directory: Path) -> None:
    """Train the tokenizer, or make one that needs no training, and save it as ``directory``, which appears whole."""

    def documents() -> Iterable[str]:
        train = source.documents("train")
        for start in range(0, len(train), 256):
            yield from train[start : start + 256]

    tokenizer: Tokenizer = choice.build(TokenizerContext(documents=documents))
    partial = directory.with_name(f".{directory.name}")
    partial.mkdir(exist_ok=True)
    tokenizer.save(partial)
    partial.rename(directory)


def load_tokenizer(choice: Choice, directory: Path) -> Tokenizer:
    """The tokenizer that a run saved."""

    def no_documents() -> Iterable[str]:
        raise PluginError(f"tokenizer {choice.plugin!r} asks for documents although context.saved is given")

    tokenizer = choice.build(TokenizerContext(documents=no_documents, saved=directory))
    if not isinstance(tokenizer, Tokenizer):
        raise PluginError(f"the factory of tokenizer {choice.plugin!r} must return a nanochat_core.Tokenizer")
    return tokenizer


def build_optimizer(choice: Choice, model: Model, plan: Plan, world: World) -> Optimizer:
    """The optimizer of ``model``."""
    context = optimizer_context(model, world, plan.total_batch_size, plan.num_iterations)
    optimizer = choice.build(context)
    if not isinstance(optimizer, Optimizer):
        raise PluginError(f"the factory of optimizer {choice.plugin!r} must return a nanochat_core.Optimizer")
    return optimizer


def rows_of(
    source: DataSource, tokenizer: Tokenizer, plan: Plan, world: World
) -> Callable[[Split, int], Iterator[Batch]]:
    """``EvaluatorContext.rows``: tokenized on first use, then kept."""
    known: dict[tuple[Split, int], ValidationRows] = {}

    def rows(split: Split, tokens: int) -> Iterator[Batch]:
        if (split, tokens) not in known:
            documents: Sequence[str] = source.documents(split)
            if not len(documents):
                raise DataError(f"the data source has no {split} documents; see the options of [data]")
            known[split, tokens] = ValidationRows(
                documents,
                tokenizer,
                tokens=tokens,
                max_seq_len=plan.max_seq_len,
                device_batch_size=plan.device_batch_size,
                rank=world.rank,
                world_size=world.size,
            )
        for batch in known[split, tokens]:
            yield batch.to(world.device)

    return rows


def build_evaluators(
    choices: Sequence[Choice], source: DataSource, tokenizer: Tokenizer, plan: Plan, world: World
) -> tuple[tuple[Choice, Evaluator], ...]:
    """The evaluators, each with its entry of the experiment."""
    rows = rows_of(source, tokenizer, plan, world)
    context = EvaluatorContext(tokenizer, world, plan.max_seq_len, plan.device_batch_size, rows)
    built = []
    for choice in choices:
        evaluator = choice.build(context)
        if not isinstance(evaluator, Evaluator):
            raise PluginError(f"the factory of evaluator {choice.plugin!r} must return a nanochat_core.Evaluator")
        built.append((choice, evaluator))
    return tuple(built)


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
    experiment = load(run.experiment, (), load_plugins()).require_all().experiment
    tokenizer = load_tokenizer(experiment.tokenizer, run.tokenizer)
    dtype: torch.dtype = getattr(torch, experiment.train.dtype)
    context = ModelContext(tokenizer.vocab_size, experiment.train.max_seq_len, device, dtype)
    model = build_model(experiment.model, context, torch.device("cpu"))
    load_model_tensors(model, load_weights(checkpoint), str(checkpoint))
    return TrainedModel(model.to(device).eval(), tokenizer, experiment, dtype, checkpoint)
