"""A step: what ranks add up, the update it makes, and what leaves everything as it was."""

from __future__ import annotations

import math
from typing import Any

import attrs
import pytest
import torch
import torch.distributed
from helpers.ranks import on_ranks
from torch import Tensor

from nanochat_core import IGNORED, Batch, Model, Multipliers, TorchOptimizer, World
from nanochat_core.data.loader import Step
from nanochat_core.training.step import StepOutcome, StepTotals, run_step

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
needs_gloo = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")


class Bigram(Model):
    """The logits of a token are the row of it in one matrix.

    Args:
        fails_at: pass that runs out of memory, from 1.
    """

    def __init__(self, fails_at: int = 0) -> None:
        super().__init__()
        self.vocab_size, self.hidden_size = 5, 5
        self.rows = torch.nn.Parameter(torch.linspace(-1, 1, 25).view(5, 5))
        self.passes, self.fails_at = 0, fails_at

    def hidden(self, ids_BT: Tensor, cache: Any = None) -> Tensor:
        self.passes += 1
        torch.rand(3)
        if self.passes == self.fails_at:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 EiB")
        return self.rows[ids_BT]

    def logits(self, hidden_ND: Tensor) -> Tensor:
        return hidden_ND.float()


def sgd(model: Bigram, world: World = ALONE) -> TorchOptimizer:
    return TorchOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), dict(model.named_parameters()), world)


def batch(*rows: list[int]) -> Batch:
    tokens = torch.tensor(rows)
    return Batch(tokens[:, :-1].clone(), tokens[:, 1:].clone())


def two_batches(**more: Any) -> Step:
    first, second = batch([0, 1, 2, 3]), batch([4, 3, 2, 1])
    second.targets_BT[0, 2] = IGNORED
    return Step([first, second], cursors={}, epoch=0.25, cropped=3, dropped=4, **more)


def run(model: Bigram, step: Step | None, world: World = ALONE, **more: Any) -> StepOutcome:
    options = {"dtype": torch.float32, "multipliers": Multipliers(0, 10, lr=0.1), "grad_clip": 0.0, **more}
    return run_step(step, model, sgd(model, world), world, **options)


def expected() -> tuple[float, Tensor]:
    """(mean loss, its gradient) of ``two_batches``, in float64."""
    rows = Bigram().rows.detach().double().requires_grad_()
    pairs = [(0, 1), (1, 2), (2, 3), (4, 3), (3, 2)]
    loss = torch.stack([torch.logsumexp(rows[a], 0) - rows[a, b] for a, b in pairs]).mean()
    loss.backward()
    assert rows.grad is not None
    return loss.item(), rows.grad


# ------------------------------------------------------------------------------------------------------------ totals


def test_totals_come_back_as_they_were_packed() -> None:
    totals = StepTotals(0.0, 7, 1, 2, 3, 4, 5, 0.1)
    packed = totals.pack(torch.tensor(2.5))
    assert packed.dtype is torch.float64
    assert StepTotals.unpack(packed.tolist()) == attrs.evolve(totals, loss=2.5)


def test_packed_totals_can_be_added_up() -> None:
    one = StepTotals(tokens=7, stop_requested=True, epoch=0.25).pack(torch.tensor(2.5))
    other = StepTotals(tokens=2**53 - 7, data_ended=True, epoch=0.5).pack(torch.tensor(0.25))
    total = StepTotals.unpack((one + other).tolist())
    assert total == StepTotals(loss=2.75, tokens=2**53, stop_requested=1, data_ended=1, epoch=0.75)


def test_totals_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        StepTotals.unpack([1.0, 2.0])


# -------------------------------------------------------------------------------------------------- a step that counts


def test_a_step_is_one_update_by_the_mean_of_all_tokens() -> None:
    model, (loss, gradient) = Bigram(), expected()
    outcome = run(model, two_batches())
    assert outcome.done
    assert outcome.finite
    assert outcome.tokens == 5
    assert outcome.lost_tokens == 7
    assert outcome.epoch == 0.25
    assert (outcome.stop_requested, outcome.data_ended) == (False, False)
    assert math.isclose(outcome.loss, loss, rel_tol=1e-6)
    assert math.isclose(outcome.grad_norm, gradient.norm().item(), rel_tol=1e-6)
    torch.testing.assert_close(model.rows.detach(), (Bigram().rows - 0.5 * 0.1 * gradient.float()).detach())
    assert model.rows.grad is None


def test_a_large_gradient_is_clipped() -> None:
    model, (_, gradient) = Bigram(), expected()
    outcome = run(model, two_batches(), grad_clip=0.01)
    assert math.isclose(outcome.grad_norm, gradient.norm().item(), rel_tol=1e-6)  # that before clipping
    change = (Bigram().rows - model.rows).detach().norm().item()
    assert math.isclose(change, 0.5 * 0.1 * 0.01, rel_tol=1e-3)


def test_a_loss_scale_changes_neither_numbers_nor_update() -> None:
    plain, scaled = Bigram(), Bigram()
    assert run(scaled, two_batches(), loss_scale=1024.0) == run(plain, two_batches())
    assert torch.equal(scaled.rows, plain.rows)


def test_requests_and_the_end_of_the_data_are_passed_on() -> None:
    outcome = run(Bigram(), two_batches(is_last=True), stop_requested=True)
    assert (outcome.stop_requested, outcome.data_ended, outcome.done) == (True, True, True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_makes_no_update(value: float) -> None:
    model = Bigram()
    with torch.no_grad():
        model.rows[0, 0] = value
    before = model.rows.detach().clone()
    outcome = run(model, two_batches())
    assert outcome.done  # it counts, as skipped
    assert not outcome.finite
    assert not math.isfinite(outcome.loss)
    torch.testing.assert_close(model.rows.detach(), before, equal_nan=True)
    assert model.rows.grad is None


# --------------------------------------------------------------------------------------- steps that leave all as it was


@pytest.mark.parametrize("fails_at", [1, 2])
def test_running_out_of_memory_changes_nothing(fails_at: int) -> None:
    model, generator = Bigram(fails_at), torch.get_rng_state()
    outcome = run(model, two_batches())
    assert not outcome.done
    assert outcome.out_of_memory
    assert outcome.memory_error == "CUDA out of memory. Tried to allocate 1 EiB"
    assert torch.equal(model.rows, Bigram().rows)
    assert model.rows.grad is None
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_rank_without_data_does_its_part() -> None:
    model = Bigram()
    outcome = run(model, None, stop_requested=True)
    assert not outcome.done
    assert outcome.data_missing
    assert outcome.stop_requested
    assert torch.equal(model.rows, Bigram().rows)


def test_other_errors_come_through() -> None:
    model = Bigram()
    with pytest.raises(IndexError):
        run(model, Step([batch([0, 9])], cursors={}, epoch=0.0))


# ------------------------------------------------------------------------------------------------------- several ranks


def _on_two(world: World) -> dict[str, Any]:
    """A step of ``two_batches`` with one micro-batch on each rank, and steps in which rank 1 is in trouble."""
    model, whole = Bigram(), two_batches(is_last=world.rank == 0)
    part = attrs.evolve(whole, batches=whole.batches[world.rank :][:1])
    halves = attrs.asdict(run(model, part, world, stop_requested=world.rank == 1))
    found: dict[str, Any] = {"halves": (halves, model.rows.flatten().tolist())}
    for trouble in ("no memory", "no data"):
        model = Bigram(fails_at=2 if trouble == "no memory" and world.rank == 1 else 0)
        outcome = run(model, None if trouble == "no data" and world.rank == 1 else two_batches(), world)
        untouched = torch.equal(model.rows, Bigram().rows) and model.rows.grad is None
        found[trouble] = (outcome.data_missing, outcome.out_of_memory, outcome.memory_error, outcome.done, untouched)
    return found


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return on_ranks(2, _on_two)


@needs_gloo
def test_ranks_do_the_step_of_one(two_ranks: list[dict[str, Any]]) -> None:
    (outcome, rows), other = (found["halves"] for found in two_ranks)
    assert (outcome, rows) == other
    model = Bigram()
    alone = run(model, two_batches())
    assert outcome == {
        **attrs.asdict(alone),
        "loss": pytest.approx(alone.loss, rel=1e-6),
        "grad_norm": pytest.approx(alone.grad_norm, rel=1e-6),
        "stop_requested": True,
        "data_ended": True,
        "lost_tokens": 2 * alone.lost_tokens,
    }
    assert rows == pytest.approx(model.rows.flatten().tolist(), rel=1e-6)


@needs_gloo
def test_a_rank_without_memory_or_data_stops_the_step_of_all(two_ranks: list[dict[str, Any]]) -> None:
    said = "CUDA out of memory. Tried to allocate 1 EiB"
    done, untouched = False, True
    assert [found["no memory"] for found in two_ranks] == [
        (False, True, "", done, untouched),
        (False, True, said, done, untouched),
    ]
    assert [found["no data"] for found in two_ranks] == [(True, False, "", done, untouched)] * 2


class Counting(Bigram):
    """Its forward pass changes one buffer in place, puts another in place of a second one, and leaves a third."""

    def __init__(self, fails_at: int = 0, factor: float = 1.0) -> None:
        super().__init__(fails_at)
        self.factor = factor
        self.register_buffer("total", torch.zeros(2))
        self.register_buffer("last", torch.zeros(()), persistent=False)
        self.register_buffer("wide", torch.ones(1).expand(3))

    def hidden(self, ids_BT: Tensor, cache: Any = None) -> Tensor:
        self.total.data += 1
        self.last = ids_BT.sum().float() + 1
        return super().hidden(ids_BT, cache)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        return super().logits(hidden_ND) * self.factor


@pytest.mark.parametrize(
    ("model", "step"),
    [(Counting(fails_at=2), two_batches()), (Counting(factor=math.nan), two_batches())],
    ids=["out of memory", "not finite"],
)
def test_buffers_are_as_before_when_a_step_is_dropped(model: Counting, step: Step) -> None:
    last = model.last
    outcome = run(model, step)
    assert not (outcome.done and outcome.finite)
    assert model.total.tolist() == [0, 0]
    assert model.last is last
    assert model.last == 0


def test_buffers_of_a_step_that_counts_stay_changed() -> None:
    model = Counting()
    assert run(model, two_batches()).finite
    assert model.total.tolist() == [2, 2]
    assert model.last > 0
