"""The contract check of optimizers; plugin authors import it from ``nanochat_core.testing``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nanochat_core.interfaces.model import Cache, Model
from nanochat_core.interfaces.optimizer import Multipliers, Optimizer, OptimizerContext
from nanochat_core.testing.checks import ALONE, Check


class TinyModel(Model):
    """A model that predicts a token from the one before, with a parameter of every role."""

    def __init__(self, vocab_size: int = 32, width: int = 16) -> None:
        super().__init__()
        self.vocab_size, self.hidden_size = vocab_size, width
        self.embedding = nn.Embedding(vocab_size, width)
        self.block = nn.Linear(width, width)
        self.gain = nn.Parameter(torch.ones(width))
        self.head = nn.Linear(width, vocab_size, bias=False)

    def hidden(self, ids_BT: Tensor, cache: Cache | None = None) -> Tensor:
        x_BTD = self.embedding(ids_BT)
        return (x_BTD + torch.tanh(self.block(x_BTD))) * self.gain

    def logits(self, hidden_ND: Tensor) -> Tensor:
        return self.head(hidden_ND).float()


def check_optimizer(
    factory: Callable[[Any, OptimizerContext], Optimizer], config: Any, *, steps: int = 30
) -> Optimizer:
    """Check that an optimizer keeps its contract, on the CPU with one rank.

    ``reduce`` returns the norm of the gradients, 0 without gradients; ``scale`` and the learning-rate multiplier are
    applied; ``discard`` changes neither parameters nor state; the loss falls; training continues exactly from a state
    that is saved and loaded.

    Args:
        factory, config: as in the registration.
        steps: number of steps in which the loss of a tiny model must fall.

    Returns:
        The optimizer, after some steps.

    Raises:
        AssertionError: with a line for every rule that is broken.
    """
    check = _OptimizerCheck(factory, config, steps)
    optimizer = check.build(check.model())
    assert isinstance(optimizer, Optimizer), f"the factory must return a nanochat_core.Optimizer, not {optimizer!r}"
    parts = (check.norm, check.scale, check.learning_rate, check.discard, check.nothing, check.state, check.resume)
    for part in (*parts, check.learns):
        check.run(part)
    check.finish()
    return optimizer


class _OptimizerCheck(Check):
    def __init__(self, factory: Callable[[Any, OptimizerContext], Optimizer], config: Any, steps: int) -> None:
        super().__init__("optimizer")
        self.factory, self.config, self.steps = factory, config, steps
        generator = torch.Generator().manual_seed(1)
        self.ids_BT = torch.randint(32, (4, 16), generator=generator)
        self.targets_BT = (self.ids_BT * 5 + 3) % 32

    def model(self) -> TinyModel:
        torch.manual_seed(2)
        return TinyModel()

    def build(self, model: TinyModel) -> Optimizer:
        parameters = dict(model.named_parameters())
        context = OptimizerContext(parameters, model.parameter_roles(), model.hidden_size, ALONE, 64, self.steps)
        return self.factory(self.config, context)

    def step(self, model: TinyModel, optimizer: Optimizer, step: int, lr: float = 1.0, factor: float = 1.0) -> float:
        """Run one step and return the mean loss; ``scale`` undoes ``factor``, by which the gradients are multiplied."""
        optimizer.begin_reduce()
        loss = model(self.ids_BT, self.targets_BT)
        (loss * factor).backward()
        optimizer.reduce()
        optimizer.update(1 / (64 * factor), Multipliers(step, self.steps, lr))
        return loss.item() / 64

    def _parameters(self, model: TinyModel) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def _same(self, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
        return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    def norm(self) -> None:
        model = self.model()
        optimizer = self.build(model)
        optimizer.begin_reduce()
        model(self.ids_BT, self.targets_BT).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        expected = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
        norm = optimizer.reduce()
        right = norm.shape == () and norm.dtype == torch.float32
        self.expect(right, f"reduce must give a float32 scalar, not {norm.dtype} {tuple(norm.shape)}")
        self.expect(math.isclose(norm.item(), expected, rel_tol=1e-4), f"reduce gives {norm.item()}, not {expected}")
        optimizer.update(1 / 64, Multipliers(0, self.steps, 1.0))
        optimizer.begin_reduce()
        model(self.ids_BT, self.targets_BT).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        expected = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
        self.expect(
            math.isclose(optimizer.reduce().item(), expected, rel_tol=1e-4), "update leaves old gradients behind"
        )

    def scale(self) -> None:
        results = []
        for factor in (1.0, 64.0):
            model = self.model()
            optimizer = self.build(model)
            for step in range(3):
                self.step(model, optimizer, step, factor=factor)
            results.append(self._parameters(model))
        close = all(torch.allclose(results[0][n], results[1][n], rtol=1e-4, atol=1e-6) for n in results[0])
        self.expect(
            close, "gradients times 64 and a scale of 1/64 give a different update: apply scale to the gradients"
        )

    def learning_rate(self) -> None:
        model = self.model()
        optimizer = self.build(model)
        before = self._parameters(model)
        self.step(model, optimizer, 0, lr=0.0)
        self.expect(self._same(before, self._parameters(model)), "a learning-rate multiplier of 0 changes parameters")
        self.step(model, optimizer, 1)
        after = self._parameters(model)
        still = [name for name in before if torch.equal(before[name], after[name])]
        self.expect(not still, f"update does not change {', '.join(still)}")

    def discard(self) -> None:
        model = self.model()
        optimizer = self.build(model)
        self.step(model, optimizer, 0)
        parameters, state = self._parameters(model), {k: v.clone() for k, v in optimizer.state_dict().items()}
        optimizer.begin_reduce()
        (model(self.ids_BT, self.targets_BT) * math.nan).backward()
        optimizer.reduce()
        optimizer.discard()
        self.expect(self._same(parameters, self._parameters(model)), "discard changes parameters")
        self.expect(self._same(state, optimizer.state_dict()), "discard changes the state")
        self.step(model, optimizer, 1)
        finite = all(torch.isfinite(p).all() for p in model.parameters())
        self.expect(finite, "after discard the gradients are still there")

    def nothing(self) -> None:
        model = self.model()
        optimizer = self.build(model)
        self.step(model, optimizer, 0)
        before = self._parameters(model)
        optimizer.begin_reduce()
        norm = optimizer.reduce().item()
        self.expect(norm == 0, f"reduce gives {norm} without a backward pass: missing gradients must count as zeros")
        optimizer.discard()
        self.expect(self._same(before, self._parameters(model)), "a step without gradients changes parameters")
        self.step(model, optimizer, 1)

    def state(self) -> None:
        model = self.model()
        optimizer = self.build(model)
        before = optimizer.state_bytes()
        self.step(model, optimizer, 0)
        names = set(self._parameters(model))
        for key, tensor in optimizer.state_dict().items():
            self.expect(isinstance(tensor, Tensor), f"state_dict()[{key!r}] is not a tensor")
            name, slash, what = key.rpartition("/")
            known = bool(slash and what) and (name in names or not name)
            self.expect(known, f"state_dict key {key!r} is not <parameter name>/<what>")
        self.expect(optimizer.state_bytes() == before, "state_bytes changes after the first update")

    def resume(self) -> None:
        whole = self.model()
        optimizer = self.build(whole)
        for step in range(3):
            self.step(whole, optimizer, step)
        state = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
        part = self.model()
        part.load_state_dict(whole.state_dict())
        resumed = self.build(part)
        resumed.load_state_dict(state)
        self.expect(self._same(resumed.state_dict(), state), "load_state_dict does not restore what state_dict gave")
        for step in range(3, 6):
            self.step(whole, optimizer, step)
            self.step(part, resumed, step)
        same = self._same(self._parameters(whole), self._parameters(part))
        self.expect(same, "a resumed optimizer makes different updates: its state is not complete")

    def learns(self) -> None:
        model = self.model()
        optimizer = self.build(model)
        losses = [self.step(model, optimizer, step) for step in range(self.steps)]
        self.expect(
            losses[-1] < losses[0] - 0.05,
            f"in {self.steps} steps the loss goes from {losses[0]} to {losses[-1]}: it must fall by 0.05 at least",
        )
