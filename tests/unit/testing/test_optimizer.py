"""``check_optimizer`` notices each way of breaking the contract of optimizers."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch

from nanochat_core import Multipliers, TorchOptimizer
from nanochat_core.testing import check_optimizer


class SGD(TorchOptimizer):
    def __init__(self, config: object, context: Any) -> None:
        sgd = torch.optim.SGD(context.parameters.values(), lr=0.3, momentum=0.9)
        super().__init__(sgd, context.parameters, context.world, state_tensors=1)


class LosesMomentum(SGD):
    def state_dict(self) -> Any:
        return {name: torch.zeros_like(tensor) for name, tensor in super().state_dict().items()}


class IgnoresScale(SGD):
    def update(self, scale: float, multipliers: Multipliers) -> None:
        super().update(1 / 64, multipliers)


class IgnoresRate(SGD):
    def update(self, scale: float, multipliers: Multipliers) -> None:
        super().update(scale, attrs.evolve(multipliers, lr=1.0))


class DiscardsNothing(SGD):
    def discard(self) -> None:
        pass


class WrongNorm(SGD):
    def reduce(self) -> Any:
        return super().reduce() * 2


class NeedsGradients(SGD):
    def reduce(self) -> Any:
        if any(p.grad is None for p in self.parameters.values()):
            raise ValueError("where are they?")
        return super().reduce()


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (LosesMomentum, "a resumed optimizer makes different updates"),
        (IgnoresScale, "apply scale to the gradients"),
        (IgnoresRate, "a learning-rate multiplier of 0 changes parameters"),
        (DiscardsNothing, "after discard the gradients are still there"),
        (WrongNorm, "reduce gives"),
        (NeedsGradients, "where are they"),
    ],
)
def test_broken_optimizers(optimizer: Any, reason: str) -> None:
    check_optimizer(SGD, None)
    with pytest.raises(AssertionError, match=reason):
        check_optimizer(optimizer, None)


def test_check_optimizer_refuses_what_is_none() -> None:
    with pytest.raises(AssertionError, match=r"must return a nanochat_core\.Optimizer"):
        check_optimizer(lambda config, context: object(), None)  # type: ignore[arg-type,return-value]
