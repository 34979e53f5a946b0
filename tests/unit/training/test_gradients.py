from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.ranks import on_ranks
from torch import Tensor, nn

from nanochat_core import GradientExchange, GradientReducer, Multipliers, PluginError, TorchOptimizer, World
from nanochat_core.training.gradients import global_norm

ALONE = World(0, 1, torch.device("cpu"))


class Net(nn.Module):
    """Two layers, a bfloat16 table, and a branch that only some batches use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(10, 6, dtype=torch.bfloat16)
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 4)
        self.branch = nn.Linear(6, 4)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, ids: Tensor, branch: bool) -> Tensor:
        x = self.table(ids).float()
        y = self.second(torch.tanh(self.first(x)))
        return (y + self.branch(x) if branch else y).square().sum()


def ids(rank: int, micro_batch: int) -> Tensor:
    return torch.randint(0, 10, (5,), generator=torch.Generator().manual_seed(10 * rank + micro_batch))


def backward(model: Net, ranks: range, reducer: Any = None) -> None:
    """Two micro-batches a rank; only rank 1's second one takes the branch."""
    for micro_batch in range(2):
        if micro_batch == 1 and reducer is not None:
            reducer.begin()
        for rank in ranks:
            model(ids(rank, micro_batch), branch=(rank, micro_batch) == (1, 1)).backward()


def reduce_twice(world: World, bucket_bytes: float) -> dict[str, Tensor]:
    model = Net()
    reducer = GradientReducer(dict(model.named_parameters()), world, bucket_bytes)
    backward(model, range(world.rank, world.rank + 1), reducer)
    reducer.discard()  # a skipped step leaves nothing behind
    assert all(p.grad is None for p in model.parameters())
    if world.is_main:
        backward(model, range(1), reducer)
    else:  # told to stop while it waits for data, it has no part of the step
        reducer.begin()
    of_one_rank = reducer.finish()
    reducer.discard()
    backward(model, range(world.rank, world.rank + 1), reducer)
    norm = reducer.finish()
    return {"norm": norm, "of_one_rank": of_one_rank, **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.xdist_group("ranks")
def test_two_ranks_sum_to_what_one_rank_gets_from_all_batches() -> None:
    ours = on_ranks(2, reduce_twice, 100.0)  # small enough for several buckets
    alone = Net()
    backward(alone, range(2))
    for name in ours[0]:
        assert torch.equal(ours[0][name], ours[1][name]), name
    total = torch.zeros(())
    one = Net()
    backward(one, range(1))
    torch.testing.assert_close(
        ours[0]["of_one_rank"], global_norm([p.grad for p in one.parameters() if p.grad is not None]), rtol=1e-2, atol=0
    )
    for name, parameter in alone.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        rough = {"rtol": 2e-2, "atol": 2e-2} if expected.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(ours[0][name], expected, **rough)
        total += ours[0][name].double().square().sum().float()
    torch.testing.assert_close(ours[0]["norm"], total.sqrt())


class Noted:
    """A message that notes when it is sent and waited for."""

    def __init__(self, name: str, events: list[str], *parameters: nn.Parameter) -> None:
        self.name, self.events, self.parameters = name, events, parameters

    def send(self) -> None:
        self.events.append(f"send {self.name}")

    def wait(self) -> None:
        self.events.append(f"wait {self.name}")


def noted_exchange(learn_order: bool) -> tuple[list[nn.Parameter], list[str], GradientExchange]:
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    events: list[str] = []
    messages = [Noted(name, events, parameter) for name, parameter in zip("abc", parameters, strict=True)]
    return parameters, events, GradientExchange(messages, ALONE, learn_order)


def chain(parameters: list[nn.Parameter]) -> Tensor:
    """A product whose backward pass completes the last parameter first."""
    product = torch.ones(2)
    for parameter in parameters:
        product = product * parameter
    return product.sum()


@pytest.mark.parametrize("learn_order", [False, True])
def test_an_exchange_sends_in_one_order_which_it_may_learn(learn_order: bool) -> None:
    parameters, events, exchange = noted_exchange(learn_order)
    for expected in ("abc", "cba" if learn_order else "abc"):
        exchange.begin()
        assert exchange.started
        chain(parameters).backward()
        exchange.finish()
        assert not exchange.started
        assert events == [*(f"send {name}" for name in expected), "wait a", "wait b", "wait c"]
        events.clear()


def test_an_exchange_sends_what_is_complete_during_the_backward_pass() -> None:
    parameters, events, exchange = noted_exchange(False)
    exchange.begin()
    chain(parameters[:1]).backward()
    assert events == ["send a"]
    chain(parameters[2:]).backward()
    assert events == ["send a"]  # c waits for b, so that all ranks send alike
    exchange.finish()
    assert events == ["send a", "send b", "send c", "wait a", "wait b", "wait c"]


def test_an_exchange_refuses_gradients_that_come_too_late() -> None:
    parameters, _, exchange = noted_exchange(False)
    exchange.begin()
    chain(parameters).backward()
    parameters[1].sum().backward()
    with pytest.raises(PluginError, match="use_reentrant=False"):
        exchange.finish()
    exchange.begin()  # the next step is not affected
    chain(parameters).backward()
    exchange.finish()


def test_alone_nothing_is_copied_and_missing_gradients_become_zeros() -> None:
    model = Net()
    reducer = GradientReducer(dict(model.named_parameters()), ALONE)
    reducer.begin()
    backward(model, range(1))
    before = {name: p.grad for name, p in model.named_parameters()}
    norm = reducer.finish()
    assert norm.dtype == torch.float32
    squares = 0.0
    for name, parameter in model.named_parameters():
        if before[name] is not None:
            assert parameter.grad is before[name]
            squares += parameter.grad.double().square().sum().item()
        else:
            assert torch.count_nonzero(parameter.grad) == 0
    assert norm.item() == pytest.approx(squares**0.5, rel=1e-6)


def test_a_gradient_that_is_not_finite_shows_in_the_norm() -> None:
    model = Net()
    reducer = GradientReducer(dict(model.named_parameters()), ALONE)
    backward(model, range(1))
    model.first.weight.grad[0, 0] = torch.nan
    assert torch.isnan(reducer.finish())


def make(model: Net, kind: str) -> TorchOptimizer:
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [model.table.weight], "lr": 0.3},
        {"params": [p for n, p in parameters.items() if n != "table.weight"], "lr": 0.1},
    ]
    optimizer = {
        "adamw": lambda: torch.optim.AdamW(groups, weight_decay=0.1),
        "fused": lambda: torch.optim.AdamW(groups, weight_decay=0.1, fused=True),
        "sgd": lambda: torch.optim.SGD(groups, momentum=0.9),
        "plain sgd": lambda: torch.optim.SGD(groups),
    }[kind]()
    return TorchOptimizer(optimizer, parameters, ALONE)


def train(model: Net, optimizer: TorchOptimizer, steps: range) -> None:
    for step in steps:
        optimizer.begin_reduce()
        backward(model, range(1))
        optimizer.reduce()
        optimizer.update(0.5, Multipliers(step=step, num_iterations=10, lr=1 - step / 10))


@pytest.mark.parametrize("kind", ["adamw", "fused", "sgd"])
def test_a_wrapped_optimizer_equals_torch_with_scaled_gradients_and_rates(kind: str) -> None:
    ours, theirs = Net().float(), Net().float()
    train(ours, make(ours, kind), range(3))
    reference = make(theirs, kind).optimizer
    base = [group["lr"] for group in reference.param_groups]
    for step in range(3):
        backward(theirs, range(1))
        for parameter in theirs.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else 0.5 * parameter.grad
        for group, lr in zip(reference.param_groups, base, strict=True):
            group["lr"] = lr * (1 - step / 10)
        reference.step()
        reference.zero_grad()
    for ours_p, theirs_p in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours_p, theirs_p, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["adamw", "fused", "sgd", "plain sgd"])
def test_state_goes_on_exactly_where_it_was_saved(kind: str) -> None:
    straight = Net()
    train(straight, make(straight, kind), range(4))
    first = Net()
    optimizer = make(first, kind)
    assert set(optimizer.state_dict()) == {"table.weight/master"}
    train(first, optimizer, range(2))
    weights = {name: p.clone() for name, p in first.state_dict().items()}
    state = {key: value.clone() for key, value in optimizer.state_dict().items()}
    assert all(isinstance(v, Tensor) and k.rpartition("/")[0] in weights for k, v in state.items())
    second = Net()
    second.load_state_dict(weights)
    resumed = make(second, kind)
    resumed.load_state_dict(state)
    assert resumed.state_dict().keys() == state.keys()
    train(second, resumed, range(2, 4))
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_bfloat16_parameter_takes_updates_smaller_than_its_resolution() -> None:
    model = Net()
    parameters = {"table.weight": model.table.weight}
    optimizer = TorchOptimizer(torch.optim.SGD(parameters.values(), lr=1.0), parameters, ALONE, state_tensors=0)
    before = model.table.weight.detach().float()
    for step in range(256):  # 2^-12 each: half a unit in the last place is 2^-10 or more above 1/4
        model.table.weight.grad = torch.full_like(model.table.weight, -1.0)
        optimizer.reduce()
        optimizer.update(2.0**-12, Multipliers(step=step, num_iterations=256, lr=1.0))
    torch.testing.assert_close(model.table.weight.float(), before + 2.0**-4, rtol=2**-8, atol=1e-4)
    assert optimizer.state_bytes() == 4 * before.numel()


def test_discard_leaves_parameters_and_state_alone() -> None:
    model = Net()
    optimizer = make(model, "adamw")
    train(model, optimizer, range(1))
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    state = {key: value.clone() for key, value in optimizer.state_dict().items()}
    backward(model, range(1))
    optimizer.reduce()
    optimizer.discard()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(weights[n], p) for n, p in model.state_dict().items())
    assert all(torch.equal(state[k], v) for k, v in optimizer.state_dict().items())


def test_state_of_another_model_is_refused() -> None:
    with pytest.raises(KeyError, match=r"other\.weight"):
        make(Net(), "adamw").load_state_dict({"other.weight/exp_avg": torch.zeros(2)})
