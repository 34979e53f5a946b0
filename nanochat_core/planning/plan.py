"""The plan: what a run will do, computed before anything expensive. Every "auto" becomes a number with its formula."""

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
        world_size: ranks, one device each.
        vocab_size: tokens of the tokenizer.
        rows_per_step: sequences an optimizer step, all ranks.
        accumulation_steps: micro-batches a rank and step.
        num_iterations: optimizer steps; ``horizon``: why so many.
        parameter_counts: by role, and ``total``.
        scaling_parameters: how many of them the data : parameter ratio counts.
        relative_data: the same over that of the family's reference model (D / D12); None for a model without.
        flops_per_token: forward and backward.
        memory: bytes a device by purpose, estimated; ``room``: bytes that they may take together.
        checkpoint_bytes: of a checkpoint, model and the optimizer state of all ranks; ``checkpoints``: how many a run
            saves.
        choices: what "auto" chose the rows of a micro-batch from, with the memory of each; empty when they were given.
        description: what the model says of itself.
        dtype: of matrix products, by name, such as ``bfloat16``; see ``torch_dtype``.
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
        """The dtype of matrix products."""
        return dtype_of(self.dtype)

    @property
    def scales_loss(self) -> bool:
        """Whether gradients need a loss scale to stay in range: those of float16 do."""
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
        problems: why it can't run here.
        unverified: options in force whose code never ran on its hardware, by dotted key: what never ran where.
    """

    plan: Plan
    experiment: Experiment
    origins: Mapping[str, Origin]
    problems: tuple[Problem, ...] = ()
    unverified: Mapping[str, str] = attrs.field(factory=dict)
