from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat_core import Model, loss_with_gradients, without_ignored
from nanochat_core.interfaces.loss import cross_entropy

V, D, B, T = 37, 12, 3, 11


class Base(Model):
    """Embeds, mixes a little, and remembers the most positions whose logits existed at once."""

    vocab_size, hidden_size = V, D

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, D)
        self.mix = nn.Linear(D, D)
        self.most_rows = 0

    def hidden(self, ids_BT: Tensor, cache: object = None) -> Tensor:
        return torch.tanh(self.mix(self.embedding(ids_BT)))

    def logits(self, hidden_ND: Tensor) -> Tensor:
        self.most_rows = max(self.most_rows, len(hidden_ND))
        return self.score(hidden_ND)

    def score(self, hidden_ND: Tensor) -> Tensor:
        raise NotImplementedError


class Deep(Base):
    """A head of several parameters, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(D, D)
        self.out = nn.Linear(D, V)
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def score(self, hidden_ND: Tensor) -> Tensor:
        return self.out(self.up(F.gelu(self.up(hidden_ND)))) / self.temperature


class Tied(Base):
    """The embedding is the head too."""

    def score(self, hidden_ND: Tensor) -> Tensor:
        return hidden_ND @ self.embedding.weight.T


class OnlyLogits(Base):
    """No head: D = V."""

    hidden_size = V

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(D, V)

    def hidden(self, ids_BT: Tensor, cache: object = None) -> Tensor:
        return self.out(super().hidden(ids_BT))

    def score(self, hidden_ND: Tensor) -> Tensor:
        return hidden_ND


class FrozenHead(Deep):
    def __init__(self) -> None:
        super().__init__()
        self.out.requires_grad_(False)


MODELS = [Deep, Tied, OnlyLogits, FrozenHead]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanochat_core.interfaces.loss.chunk_rows", lambda *_: 8)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, V, (B, T), generator=generator)
    targets = torch.randint(0, V, (B, T), generator=generator)
    targets[0, 2:7] = targets[2, -1] = -1
    return ids, targets


def plain(model: Base, ids: Tensor, targets: Tensor) -> Tensor:
    logits = model.score(model.hidden(ids).flatten(0, 1))
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="sum")


def gradients(model: Base) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_sum_and_its_gradients_equal_the_plain_ones(kind: type[Base], factor: float) -> None:
    ours, theirs = kind(), kind()
    ids, targets = batch()
    loss, expected = ours(ids, targets), plain(theirs, ids, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    (loss * factor).backward()
    (expected * factor).backward()
    assert gradients(ours).keys() == gradients(theirs).keys()
    for name, gradient in gradients(theirs).items():
        torch.testing.assert_close(gradients(ours)[name], gradient, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: n + m)


def test_the_logits_of_the_batch_never_exist_at_once() -> None:
    model = Deep()
    model(*batch()).backward()
    assert 1 < model.most_rows <= 8
    with torch.no_grad():
        model(*batch(), "none")
    assert model.most_rows <= 8


@pytest.mark.parametrize("kind", MODELS)
def test_per_token_losses(kind: type[Base]) -> None:
    model = kind()
    ids, targets = batch()
    each = model(ids, targets, "none")
    with torch.no_grad():
        evaluated, summed = model(ids, targets, "none"), model(ids, targets)
    assert each.shape == evaluated.shape == (B, T)
    assert torch.all(evaluated[targets == -1] == 0)
    torch.testing.assert_close(evaluated, each.detach())
    torch.testing.assert_close(each.sum(), plain(model, ids, targets), rtol=1e-6, atol=0)
    torch.testing.assert_close(summed, each.sum().detach())
    each.sum().backward()
    assert model.mix.weight.grad.abs().sum() > 0


def test_a_batch_without_targets_costs_nothing_and_still_has_a_gradient() -> None:
    model = Deep()
    ids, targets = batch()
    loss = model(ids, torch.full_like(targets, -1))
    loss.backward()
    assert loss.item() == 0
    assert model.mix.weight.grad.abs().sum() == 0


def test_gradients_add_up_over_micro_batches() -> None:
    ours, theirs = Tied(), Tied()
    ids, targets = batch()
    for row in range(B):
        ours(ids[row : row + 1], targets[row : row + 1]).backward()
    plain(theirs, ids, targets).backward()
    for name, gradient in gradients(theirs).items():
        torch.testing.assert_close(gradients(ours)[name], gradient, rtol=1e-5, atol=1e-6)


def test_parameters_frozen_later_get_no_gradient() -> None:
    model = Deep()
    model(*batch()).backward()
    model.zero_grad()
    model.temperature.requires_grad_(False)
    model(*batch()).backward()
    assert model.temperature.grad is None
    assert model.out.weight.grad.abs().sum() > 0


def test_under_autocast_it_equals_the_plain_loss_under_autocast() -> None:
    ours, theirs = Deep(), Deep()
    ids, targets = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, expected = ours(ids, targets), plain(theirs, ids, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    loss.backward()
    expected.backward()
    for name, gradient in gradients(theirs).items():
        torch.testing.assert_close(gradients(ours)[name], gradient, rtol=0.05, atol=0.05)


def test_a_hidden_state_without_gradient_trains_the_head_alone() -> None:
    model = Deep()
    ids, targets = batch()
    cross_entropy(model, model.hidden(ids).detach(), targets).backward()
    assert model.mix.weight.grad is None
    assert model.out.weight.grad.abs().sum() > 0


def test_a_loss_with_its_own_gradients_is_scaled_by_what_follows_and_differentiated_once() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = torch.tensor([3.0, 4.0], requires_grad=True)

    def compute() -> tuple[Tensor, list[Tensor | None]]:
        assert not torch.is_grad_enabled()
        return (x**2).sum(), [2 * x, None]

    loss = loss_with_gradients(compute, [x, y])
    assert loss.item() == 5.0
    factor = torch.tensor(0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(factor * loss, x, create_graph=True)
    assert torch.equal(gradient.detach(), x.detach())
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    loss_with_gradients(compute, [x, y]).backward()
    assert y.grad is None


def test_positions_without_a_target_are_left_out() -> None:
    hidden_ND, targets_N = torch.arange(8.0).view(4, 2), torch.tensor([1, -1, 0, -1])
    hidden, targets = without_ignored(hidden_ND, targets_N)
    assert torch.equal(hidden, hidden_ND[[0, 2]])
    assert targets.tolist() == [1, 0]
    assert without_ignored(hidden, targets)[0] is hidden
