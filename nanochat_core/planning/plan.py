"""The plan of a run: its numbers, computed before any expensive work, with a value and formula for every "auto"."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import torch

from nanochat_core.config.origins import Origin
from nanochat_core.config.schema import Experiment
from nanochat_core.errors import Problem
from nanochat_core.hardware.casting import dtype_of


@attrs.frozen
class Plan:
    """The numbers of a run.

    Args:
        world_size: number of ranks, one device each.
        device: name of the devices.
        dtype: name of the dtype of matrix products, such as ``bfloat16``; see ``torch_dtype``.
        compile: whether the training step is compiled.
        vocab_size: number of tokens of the tokenizer.
        max_seq_len: tokens per sequence.
        device_batch_size: sequences per micro-batch and rank.
        total_batch_size: tokens per optimizer step, over all ranks.
        rows_per_step: sequences per optimizer step, over all ranks.
        accumulation_steps: micro-batches per rank and optimizer step.
        num_iterations: optimizer steps of the run; ``horizon``: the option or formula that gave this number.
        warmup_steps: steps of rising learning rate; ``warmdown_steps``: steps of falling learning rate.
        parameter_counts: number of parameters by role, and ``total``.
        scaling_parameters: number of parameters that count for the data : parameter ratio.
        relative_data: training tokens at the data : parameter ratio, divided by those of the reference model of the
            family (D / D12); None for a model without one.
        flops_per_token: FLOPs of the forward and backward pass.
        activation_checkpointing: whether activations are recomputed in the backward pass.
        memory: estimated bytes per device by purpose; ``room``: bytes available for all of them.
        choices: the rows of a micro-batch that "auto" chose from, with the memory of each; empty without "auto".
        checkpoint_bytes: size of a checkpoint: the model and the optimizer state of all ranks.
        checkpoints: number of checkpoints that the run saves.
        description: facts about the model and the optimizer, by name.
    """

    world_size: int
    device: str
    dtype: str
    compile: bool
    vocab_size: int
    max_seq_len: int
    device_batch_size: int
    total_batch_size: int
    rows_per_step: int
    accumulation_steps: int
    num_iterations: int
    horizon: str
    warmup_steps: int
    warmdown_steps: int
    parameter_counts: Mapping[str, int]
    scaling_parameters: int
    relative_data: float | None
    flops_per_token: float
    activation_checkpointing: bool
    memory: Mapping[str, int]
    room: int
    choices: Mapping[int, Mapping[str, int]]
    checkpoint_bytes: int
    checkpoints: int
    description: Mapping[str, str | int]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of matrix products, as a ``torch.dtype``."""
        return dtype_of(self.dtype)

    @property
    def scales_loss(self) -> bool:
        """Whether the loss must be scaled to keep gradients in range, which is so for float16."""
        return self.dtype == "float16"

    @property
    def total_tokens(self) -> int:
        return self.num_iterations * self.total_batch_size

    @property
    def total_flops(self) -> float:
        return self.flops_per_token * self.total_tokens


@attrs.frozen
class Planned:
    """A plan, the experiment with every "auto" filled in, and the origins of all values.

    Args:
        problems: reasons why the run is not possible on this machine.
        unverified: options in force whose code has never run on its hardware: dotted key to a note on what is untested.
    """

    plan: Plan
    experiment: Experiment
    origins: Mapping[str, Origin]
    problems: tuple[Problem, ...] = ()
    unverified: Mapping[str, str] = attrs.field(factory=dict)
