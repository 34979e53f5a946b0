"""The training step of an experiment, for benchmarks: the real plan, model and optimizer, on made-up tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from nanochat_core import ConfigError, Multipliers, World
from nanochat_core.config.load import load
from nanochat_core.hardware.casting import autocast
from nanochat_core.planning.build import build_model, build_optimizer
from nanochat_core.planning.planner import make_plan
from nanochat_core.plugins.discovery import load_plugins

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


class Training:
    """An experiment, planned and built for one device.

    Args:
        file: of the experiment.
        overrides: ``key=value``, as for ``--set``.
        device: device to train on.

    Raises:
        ConfigError: when the experiment is not valid, or can't be trained on the device.
    """

    def __init__(self, file: Path, overrides: Sequence[str], device: torch.device) -> None:
        planned = make_plan(load(file, overrides, load_plugins()).require_all(), 1, device)
        if planned.problems:
            raise ConfigError(planned.problems)
        self.plan, self.experiment, self.device = planned.plan, planned.experiment, device
        train = self.experiment.train
        self.dtype = self.plan.torch_dtype
        torch.manual_seed(train.seed)
        model = build_model(self.experiment.model, train, self.plan.vocab_size, device, for_training=True)
        self.model = model.to(device).train()
        self.optimizer = build_optimizer(self.experiment.optimizer, self.model, self.plan, World(0, 1, device))
        if self.plan.compile:
            self.model.compile_training()
        self.steps = 0

    def batch(self) -> tuple[Tensor, Tensor]:
        """Ids and targets of one step, int64 [rows per step, T]."""
        return made_up_tokens(self.plan.rows_per_step, self.plan.max_seq_len, self.plan.vocab_size, self.device)

    def step(self, ids: Tensor, targets: Tensor) -> float:
        """Do one optimizer step in micro-batches, like the trainer. Returns the mean loss in nats per token."""
        rows = self.plan.device_batch_size
        micro_batches = list(zip(ids.split(rows), targets.split(rows), strict=True))
        loss_sum = torch.zeros((), device=self.device)
        for index, (x, y) in enumerate(micro_batches):
            if index == len(micro_batches) - 1:
                self.optimizer.begin_reduce()
            loss_sum += self.forward_backward(x, y)
        loss, norm = torch.stack([loss_sum, self.optimizer.reduce()]).div(targets.numel()).tolist()
        clip = self.experiment.train.grad_clip
        scale = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        self.optimizer.update(scale / targets.numel(), Multipliers(self.steps, self.plan.num_iterations, lr=1.0))
        self.steps += 1
        return loss

    def forward_backward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Forward and backward of a micro-batch. Returns the sum of its losses."""
        with autocast(self.device, self.dtype):
            loss: Tensor = self.model(ids, targets)
        loss.backward()
        return loss.detach()


def made_up_tokens(rows: int, T: int, vocab_size: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Ids and targets, int64 [rows, T], with frequencies like those of words (1 / rank)."""
    generator = torch.Generator().manual_seed(0)
    weights = 1 / torch.arange(1, vocab_size + 1)
    ids = torch.multinomial(weights, rows * (T + 1), replacement=True, generator=generator).view(rows, -1).to(device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
