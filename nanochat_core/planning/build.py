"""Building the model and the optimizer of an experiment."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping

import torch

from nanochat_core.config.schema import Train
from nanochat_core.distributed.world import World
from nanochat_core.errors import ConfigError, PluginError, Problem
from nanochat_core.files import shorten
from nanochat_core.hardware.machine import compute_dtype
from nanochat_core.interfaces.model import Model, ModelContext, description_problems, output_problems
from nanochat_core.interfaces.optimizer import Optimizer, OptimizerContext
from nanochat_core.interfaces.tokenizer import Tokenizer, TokenizerContext, vocabulary_problems
from nanochat_core.interfaces.types import Resolved
from nanochat_core.planning.plan import Plan
from nanochat_core.plugins.choice import Choice
from nanochat_core.plugins.structure import fields_of

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

    tokenizer = choice.build(TokenizerContext(documents=no_documents))
    if not isinstance(tokenizer, Tokenizer):
        raise choice.breaks(f"the factory must return a nanochat_core.Tokenizer, not {shorten(tokenizer)}")
    with choice.calling():
        for problem in vocabulary_problems(tokenizer):
            raise choice.breaks(problem)
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
        model = choice.build(ModelContext(vocab_size, train.max_seq_len, device, compute_dtype(train.dtype, device)))
    if not isinstance(model, Model):
        raise choice.breaks(f"the factory must return a nanochat_core.Model, not {shorten(model)}")
    with choice.calling():
        for problem in description_problems(model, train.max_seq_len):
            raise choice.breaks(problem)
        if built_on.type == "meta":
            with contextlib.suppress(NotImplementedError, RuntimeError):  # an operation has no meta kernel
                check_outputs(choice, model)
        _check_resolved(choice, model)
    if model.vocab_size < vocab_size:
        message = (
            f"the tokenizer has {vocab_size} tokens, but the model has only {model.vocab_size}: "
            f"raise the model's vocabulary or lower tokenizer.vocab_size"
        )
        raise ConfigError([Problem("model.plugin", message)])
    if for_training and train.activation_checkpointing:
        try:
            with choice.calling():
                model.checkpoint_activations()
        except PluginError as error:
            if not isinstance(error.__cause__, NotImplementedError):
                raise
            message = f'model plugin "{choice.plugin}" has no activation checkpointing: set it to false'
            raise ConfigError([Problem("train.activation_checkpointing", message)]) from None
    return model


def check_outputs(choice: Choice, model: Model) -> None:
    """Raise a PluginError when what a model computes has other shapes or dtypes than its contract says.

    Call it where the model will compute, under the same autocast: a forward pass of two tokens.
    """
    was_training = model.training
    model.eval()
    try:
        for problem in output_problems(model):
            raise choice.breaks(problem)
    finally:
        model.train(was_training)


def _check_resolved(choice: Choice, part: Model | Optimizer) -> None:
    """Refuse values for options that the plugin does not have, and descriptions that can't be shown."""
    resolved, described, options = part.resolved_options(), part.describe(), fields_of(type(choice.config))
    if not isinstance(resolved, Mapping) or not all(isinstance(value, Resolved) for value in resolved.values()):
        raise choice.breaks(f"resolved_options() must map options to Resolved values, not {shorten(resolved)}")
    if unknown := [name for name in resolved if name not in options]:
        raise choice.breaks(f"resolved_options() has {shorten(unknown[0])}, which is not one of its options")
    is_table = isinstance(described, Mapping) and all(
        isinstance(name, str) and isinstance(value, str | int) for name, value in described.items()
    )
    if not is_table:
        raise choice.breaks(f"describe() must map names to texts and whole numbers, not {shorten(described)}")


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
    """Build the optimizer of ``model``. See ``optimizer_from``."""
    context = optimizer_context(model, world, plan.total_batch_size, plan.num_iterations, plan.relative_data)
    return optimizer_from(choice, context)


def optimizer_from(choice: Choice, context: OptimizerContext) -> Optimizer:
    """Build an optimizer, and check that it keeps the contract of optimizers.

    Raises:
        PluginError: when the factory returns no Optimizer, or one that breaks the contract.
    """
    optimizer = choice.build(context)
    if not isinstance(optimizer, Optimizer):
        raise choice.breaks(
            f"the factory must return a nanochat_core.Optimizer, not {shorten(optimizer)}; "
            f"nanochat_core.TorchOptimizer makes one of any optimizer of torch"
        )
    with choice.calling():
        size = optimizer.state_bytes()
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise choice.breaks(f"state_bytes() must be a number of bytes, not {shorten(size)}")
        _check_resolved(choice, optimizer)
    return optimizer
