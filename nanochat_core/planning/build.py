"""Building the model and the optimizer of an experiment."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from nanochat_core.config.schema import Train
from nanochat_core.distributed.world import World
from nanochat_core.errors import ConfigError, PluginError, Problem
from nanochat_core.hardware.casting import dtype_of
from nanochat_core.interfaces.model import Model, ModelContext
from nanochat_core.interfaces.optimizer import Optimizer, OptimizerContext
from nanochat_core.interfaces.tokenizer import Tokenizer, TokenizerContext
from nanochat_core.planning.plan import Plan
from nanochat_core.plugins.choice import Choice

CPU = torch.device("cpu")


def planned_vocab_size(choice: Choice) -> int:
    """Return the vocabulary size of a tokenizer before it is trained: its option ``vocab_size``, or that of the built
    tokenizer if it needs no training.

    Raises:
        PluginError: when a tokenizer without an option ``vocab_size`` asks for documents.
    """
    size = getattr(choice.config, "vocab_size", None)
    if isinstance(size, int):
        return size

    def no_documents() -> Iterable[str]:
        raise PluginError(
            f"tokenizer plugin {choice.plugin!r} trains on documents but has no option vocab_size: its config class "
            f"needs that option, so that a run can be planned before the tokenizer is trained"
        )

    tokenizer: Tokenizer = choice.build(TokenizerContext(documents=no_documents))
    return tokenizer.vocab_size


def build_model(
    choice: Choice,
    train: Train,
    vocab_size: int,
    device: torch.device,
    *,
    for_training: bool,
    built_on: torch.device = CPU,
) -> Model:
    """Build a model that will run on ``device``, and check that it keeps the contract of models.

    Args:
        choice: the ``[model]`` table.
        train: the ``[train]`` table, in which ``dtype`` is no longer "auto".
        vocab_size: number of tokens of the tokenizer.
        for_training: whether to apply ``train.activation_checkpointing``.
        built_on: device of the parameters of the returned model: the CPU, or the meta device for a model of which
            only parameters, memory and FLOPs are counted.

    Raises:
        PluginError: when the factory returns no Model, or one that breaks the contract.
        ConfigError: when its vocabulary is smaller than the tokenizer's, or it has no activation checkpointing.
    """
    with built_on:
        model = choice.build(ModelContext(vocab_size, train.max_seq_len, device, dtype_of(train.dtype)))
    if not isinstance(model, Model):
        raise PluginError(
            f"the factory of model {choice.plugin!r} must return a nanochat_core.Model, not {type(model)}"
        )
    for attribute in ("vocab_size", "hidden_size"):
        if not isinstance(getattr(model, attribute, None), int):
            raise PluginError(f"model {choice.plugin!r} must set self.{attribute} to an int")
    if model.vocab_size < vocab_size:
        message = (
            f"the tokenizer has {vocab_size} tokens, but the model has only {model.vocab_size}: "
            f"raise the model's vocabulary or lower tokenizer.vocab_size"
        )
        raise ConfigError([Problem("model.plugin", message)])
    unknown = {n for n, _ in model.named_parameters()} - set(model.parameter_roles())
    if unknown:
        raise PluginError(f"parameter_roles() of model {choice.plugin!r} lacks {', '.join(sorted(unknown))}")
    if for_training and train.activation_checkpointing:
        try:
            model.checkpoint_activations()
        except NotImplementedError:
            message = f'model plugin "{choice.plugin}" has no activation checkpointing: set it to false'
            raise ConfigError([Problem("train.activation_checkpointing", message)]) from None
    return model


def optimizer_context(
    model: Model, world: World, total_batch_size: int, num_iterations: int, relative_data: float | None
) -> OptimizerContext:
    """Return the context from which the optimizer of ``model`` is built."""
    return OptimizerContext(
        parameters={n: p for n, p in model.named_parameters() if p.requires_grad},
        roles=dict(model.parameter_roles()),
        hidden_size=model.hidden_size,
        world=world,
        total_batch_size=total_batch_size,
        num_iterations=num_iterations,
        relative_data=relative_data,
    )


def build_optimizer(choice: Choice, model: Model, plan: Plan, world: World) -> Optimizer:
    """Build the optimizer of ``model``.

    Raises:
        PluginError: when the factory returns no Optimizer.
    """
    context = optimizer_context(model, world, plan.total_batch_size, plan.num_iterations, plan.relative_data)
    optimizer = choice.build(context)
    if not isinstance(optimizer, Optimizer):
        raise PluginError(f"the factory of optimizer {choice.plugin!r} must return a nanochat_core.Optimizer")
    return optimizer
