"""``muon_adamw`` on several ranks: the same parameters, state and norm as on one, whatever divides or doesn't."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from helpers.ranks import on_ranks
from helpers.recipes import MODERN_MUON
from torch import Tensor, nn

from nanochat_core import Model, ModelContext, Multipliers, OptimizerContext, PluginError, World
from nanochat_gpt.config import GPTConfig
from nanochat_gpt.model import build as build_gpt
from nanochat_muon.config import MuonAdamWConfig
from nanochat_muon.optimizer import MuonAdamW, build

pytestmark = pytest.mark.xdist_group("ranks")

ALONE = World(0, 1, torch.device("cpu"))
EVERYTHING = MuonAdamWConfig(**MODERN_MUON)
# In the model's order. Elements of the flat ones: a multiple of 6, no multiple of 2 or 3, and too few to cut.
SHAPES = {
    "embedding": (96, 64),
    "value": (71, 49),
    "gate": (2, 12),
    **{f"tall.{i}": (8, 6) for i in range(5)},
    **{f"wide.{i}": (5, 8) for i in range(4)},
    "square.0": (7, 7),
    "square.1": (7, 7),
    "residual": (3,),
    "x0": (3,),
    "unused": (4,),
    "small": (11, 6),
    "head": (96, 64),
}
ROLES = {
    "embedding": "embedding",
    "value": "embedding.value",
    "residual": "scalar.residual",
    "x0": "scalar.x0",
    "unused": "scalar",
    "small": "head",
    "head": "head",
}
PIECES = 6  # of every gradient, dealt out to the ranks


class Bag:
    """Parameters of every kind, and an optimizer of them."""

    def __init__(self, world: World, config: MuonAdamWConfig = EVERYTHING) -> None:
        generator = torch.Generator().manual_seed(0)
        self.world = world
        self.parameters = {
            n: nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for n, s in SHAPES.items()
        }
        roles = {name: ROLES.get(name, "matrix") for name in self.parameters}
        self.optimizer: MuonAdamW = build(config, OptimizerContext(self.parameters, roles, 96, world, 64, 8, 1.0))

    def backward(self, step: int, last: bool = True) -> None:
        """This rank's share of the step's gradients. ``tall.1`` has some on rank 0 only, ``unused`` nowhere."""
        generator = torch.Generator().manual_seed(50 + step)
        loss = torch.zeros((), dtype=torch.float64)
        for name, parameter in self.parameters.items():
            for piece in range(PIECES):
                gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                mine = piece == 0 if name == "tall.1" else name != "unused"
                if mine and piece % self.world.size == self.world.rank:
                    loss = loss + (parameter * gradient).sum()
        if last:
            self.optimizer.begin_reduce()
        loss.backward()

    def step(self, step: int) -> Tensor:
        self.backward(step)
        norm = self.optimizer.reduce()
        self.optimizer.update(0.25, Multipliers(step, 8, 1.0 - 0.1 * step, warmdown=max(0.0, (step - 3) / 4)))
        return norm

    def everything(self) -> dict[str, Tensor]:
        state = self.optimizer.state_dict()
        return {
            **{n: p.detach().clone() for n, p in self.parameters.items()},
            **{k: t.clone() for k, t in state.items()},
        }

    def load(self, saved: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(saved[name])
        self.optimizer.load_state_dict({k: t for k, t in saved.items() if "/" in k})


def gpt(dtype: torch.dtype) -> tuple[Model, dict[str, nn.Parameter]]:
    torch.manual_seed(0)
    config = GPTConfig(depth=2, aspect_ratio=16, head_dim=16, n_kv_head=1)
    model = build_gpt(config, ModelContext(100, 8, torch.device("cpu"), dtype))
    return model, dict(model.named_parameters())


def train_gpt(world: World, dtype: torch.dtype, steps: int = 3) -> dict[str, Tensor]:
    """Two micro-batches a step; their rows are dealt out to the ranks."""
    model, parameters = gpt(dtype)
    config = MuonAdamWConfig(ns_dtype="float32")
    optimizer = build(config, OptimizerContext(parameters, model.parameter_roles(), model.hidden_size, world, 64, 10))
    for step in range(steps):
        for micro_batch in range(2):
            ids = torch.randint(0, 100, (12, 9), generator=torch.Generator().manual_seed(2 * step + micro_batch))
            mine = ids[world.rank :: world.size]
            if micro_batch:
                optimizer.begin_reduce()
            model(mine[:, :-1], mine[:, 1:]).backward()
        optimizer.reduce()
        optimizer.update(1 / 192, Multipliers(step, 10, 1.0))
    return {**{n: p.detach() for n, p in parameters.items()}, **optimizer.state_dict()}


def steps_of(bag: Bag, steps: range) -> dict[str, Any]:
    norms = [bag.step(step) for step in steps]
    return {"norms": torch.stack(norms), "after": bag.everything()}


def on_two(world: World) -> dict[str, Any]:
    straight = Bag(world)
    exit_stack = straight.optimizer.state_bytes()
    found = steps_of(straight, range(2))
    middle = found["after"]

    # Steps that are given up: after the sums, and in the middle of a backward pass that one rank never ran.
    straight.backward(7)
    straight.optimizer.reduce()
    straight.optimizer.discard()
    straight.backward(7, last=False)
    if world.is_main:
        straight.backward(6)
    else:
        straight.optimizer.begin_reduce()
    straight.optimizer.discard()
    assert all(p.grad is None for p in straight.parameters.values())
    untouched = straight.everything()

    rest = steps_of(straight, range(2, 5))
    resumed = Bag(world)
    resumed.load(middle)
    again = steps_of(resumed, range(2, 5))

    # More gradient for a parameter than its first in the last backward pass can't be summed.
    resumed.backward(5)
    resumed.parameters["head"].sum().backward()
    with pytest.raises(PluginError, match="use_reentrant=False"):
        resumed.optimizer.reduce()
    return {
        "middle": middle,
        "untouched": untouched,
        "norms": torch.cat([found["norms"], rest["norms"]]),
        "after": rest["after"],
        "again": again["after"],
        "held": exit_stack,
        "planned": Bag(World(world.rank, 2, torch.device("meta"))).optimizer.state_bytes(),
        "gpt": train_gpt(world, torch.float32),
        "gpt_bf16": train_gpt(world, torch.bfloat16),
    }


def on_three(world: World, middle: dict[str, Tensor]) -> dict[str, Any]:
    bag = Bag(world)
    bag.load(middle)
    return {**steps_of(bag, range(2, 5)), "gpt": train_gpt(world, torch.float32)}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float, atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape
        torch.testing.assert_close(found[name], tensor, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return on_ranks(2, on_two)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return steps_of(Bag(ALONE), range(5))


def test_two_ranks_give_the_parameters_state_and_norms_of_one(two: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for rank in two:
        torch.testing.assert_close(rank["norms"], alone["norms"], rtol=1e-6, atol=0)
        assert_same(rank["after"], alone["after"], rtol=1e-9, atol=1e-9)
    assert torch.equal(two[0]["norms"], two[1]["norms"])
    assert_same(two[0]["after"], two[1]["after"], 0, 0)


def test_a_discarded_step_leaves_no_trace_on_any_rank(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert_same(rank["untouched"], rank["middle"], 0, 0)


def test_two_ranks_resume_exactly(two: list[dict[str, Any]]) -> None:
    assert_same(two[0]["again"], two[0]["after"], 0, 0)


def test_state_of_two_ranks_goes_on_with_three_and_with_one(two: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for rank in on_ranks(3, on_three, two[0]["middle"]):
        assert_same(rank["after"], alone["after"], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(rank["norms"], alone["norms"][2:], rtol=1e-6, atol=0)
        assert_same(rank["gpt"], train_gpt(ALONE, torch.float32), rtol=1e-3, atol=1e-4)
    bag = Bag(ALONE)
    bag.load(two[0]["middle"])
    assert_same(steps_of(bag, range(2, 5))["after"], alone["after"], rtol=1e-9, atol=1e-9)


def test_a_rank_holds_its_share_of_the_state(two: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    whole = sum(t.nbytes for key, t in alone["after"].items() if "/" in key and not key.endswith("/step"))
    for rank in two:
        assert rank["held"] == rank["planned"]  # known on the meta device
        assert rank["held"] < 0.55 * whole


def test_a_gpt_trains_alike(two: list[dict[str, Any]]) -> None:
    assert_same(two[0]["gpt"], two[1]["gpt"], 0, 0)
    assert_same(two[0]["gpt"], train_gpt(ALONE, torch.float32), rtol=1e-3, atol=1e-4)


def test_a_gpt_in_bfloat16_trains_alike_on_average(two: list[dict[str, Any]]) -> None:
    """Each rank's gradients round by themselves, and AdamW makes much of small ones."""
    found, expected = two[0]["gpt_bf16"], train_gpt(ALONE, torch.bfloat16)
    assert_same(found, two[1]["gpt_bf16"], 0, 0)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).float().norm() <= 0.03 * tensor.float().norm(), name
