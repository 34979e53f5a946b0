from __future__ import annotations

import pytest
import torch

from nanochat_adamw.config import AdamWConfig
from nanochat_adamw.optimizer import build
from nanochat_core import Model, ModelContext, Multipliers, OptimizerContext, TorchOptimizer, World
from nanochat_gpt.config import GPTConfig
from nanochat_gpt.model import build as build_gpt


def gpt(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    config = GPTConfig(depth=1, aspect_ratio=16, head_dim=16)
    return build_gpt(config, ModelContext(40, 8, torch.device("cpu"), dtype))


def make(model: Model, config: AdamWConfig) -> TorchOptimizer:
    parameters, world = dict(model.named_parameters()), World(0, 1, torch.device("cpu"))
    return build(config, OptimizerContext(parameters, model.parameter_roles(), model.hidden_size, world, 64, 10))


def train(model: Model, optimizer: TorchOptimizer, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        ids = torch.randint(0, 40, (8, 9), generator=torch.Generator().manual_seed(step % 2))
        optimizer.begin_reduce()
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        losses.append(loss.item())
        optimizer.reduce()
        optimizer.update(1 / 64, Multipliers(step=step, num_iterations=10, lr=0.5))
    return losses


def test_it_equals_torch_optim_adamw_with_groups_by_role() -> None:
    config = AdamWConfig(lr=0.01, embedding_lr=0.1, weight_decay=0.2, beta1=0.8, beta2=0.9, eps=1e-9)
    ours, theirs = gpt(), gpt()
    train(ours, make(ours, config), 4)
    named = dict(theirs.named_parameters())
    embedding = named.pop("embedding.weight")
    groups = [
        {"params": [embedding], "lr": 0.05, "weight_decay": 0.0},
        {"params": list(named.values()), "lr": 0.005, "weight_decay": 0.2},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-9)
    for step in range(4):
        ids = torch.randint(0, 40, (8, 9), generator=torch.Generator().manual_seed(step % 2))
        (theirs(ids[:, :-1], ids[:, 1:]) / 64).backward()
        reference.step()
        reference.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns(dtype: torch.dtype) -> None:
    model = gpt(dtype)
    losses = train(model, make(model, AdamWConfig(lr=0.02)), 40)
    assert losses[-1] < 0.6 * losses[0]


def test_state_is_flat_and_its_size_is_known_before() -> None:
    model = gpt()
    optimizer = make(model, AdamWConfig())
    planned = optimizer.state_bytes()
    train(model, optimizer, 1)
    state = optimizer.state_dict()
    assert set(state) == {
        f"{n}/{what}" for n, _ in model.named_parameters() for what in ("step", "exp_avg", "exp_avg_sq")
    }
    assert planned == sum(t.nbytes for key, t in state.items() if not key.endswith("/step"))
