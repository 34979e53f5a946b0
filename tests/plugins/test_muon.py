from __future__ import annotations

import math

import attrs
import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn

from nanochat_core import Model, ModelContext, Multipliers, Optimizer, OptimizerContext, PluginError, World
from nanochat_gpt.config import GPTConfig
from nanochat_gpt.model import build as build_gpt
from nanochat_muon.config import MuonAdamWConfig
from nanochat_muon.muon import muon_update, orthogonalize
from nanochat_muon.optimizer import MuonAdamW, build

ALONE = World(0, 1, torch.device("cpu"))
EXACT = MuonAdamWConfig(ns_dtype="float32")


def gpt(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    config = GPTConfig(depth=2, aspect_ratio=16, head_dim=16, n_kv_head=1)
    return build_gpt(config, ModelContext(40, 8, torch.device("cpu"), dtype))


def make(model: Model, config: MuonAdamWConfig = EXACT, world: World = ALONE) -> MuonAdamW:
    return build(
        config,
        OptimizerContext(
            parameters=dict(model.named_parameters()),
            roles=model.parameter_roles(),
            hidden_size=model.hidden_size,
            world=world,
            total_batch_size=64,
            num_iterations=10,
        ),
    )


def train(model: Model, optimizer: Optimizer, steps: range, world: World = ALONE) -> list[float]:
    """Each step has 8 rows; a rank takes its share."""
    losses = []
    for step in steps:
        ids = torch.randint(0, 40, (8, 9), generator=torch.Generator().manual_seed(step % 3))
        rows = 8 // world.size
        mine = ids[rows * world.rank : rows * (world.rank + 1)]
        optimizer.begin_reduce()
        loss = model(mine[:, :-1], mine[:, 1:])
        loss.backward()
        losses.append(loss.item())
        optimizer.reduce()
        optimizer.update(1 / 64, Multipliers(step=step, num_iterations=10, lr=1.0))
    return losses


@pytest.mark.parametrize("shape", [(3, 5, 9), (2, 9, 5), (1, 6, 6)])
def test_newton_schulz_equals_its_formula_in_float64(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    g_GRC = torch.randn(shape, dtype=torch.float64)
    for matrix, ours in zip(g_GRC, orthogonalize(g_GRC, 5, torch.float64), strict=True):
        x = matrix / torch.sqrt((matrix**2).sum())
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * (x @ x.T @ x) + 2.0315 * (x @ x.T @ x @ x.T @ x)
        torch.testing.assert_close(ours, x, rtol=0, atol=1e-12)
        singular = torch.linalg.svdvals(ours)
        assert singular.min() > 0.5
        assert singular.max() < 1.3


def test_newton_schulz_in_bfloat16_is_close_and_zero_stays_zero() -> None:
    torch.manual_seed(0)
    g_GRC = torch.randn(2, 64, 32)
    exact, rough = (orthogonalize(g_GRC, 5, dtype).float() for dtype in (torch.float32, torch.bfloat16))
    assert (exact - rough).norm() / exact.norm() < 0.03
    assert torch.count_nonzero(orthogonalize(torch.zeros(1, 4, 4), 5, torch.bfloat16)) == 0


def test_matrices_move_like_torch_optim_muon() -> None:
    """For equal settings; torch's decay is the same for square matrices only. Both orthogonalise in bfloat16."""
    torch.manual_seed(0)
    ours = [torch.randn(48, 16), torch.randn(48, 16), torch.randn(48, 16)]
    theirs = [nn.Parameter(p.clone()) for p in ours]
    start = [p.clone() for p in ours]
    reference = torch.optim.Muon(theirs, lr=0.03, weight_decay=0.0, momentum=0.9, nesterov=True)
    buffer_GRC = torch.zeros(3, 48, 16)
    settings = {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.0, "steps": 5, "dtype": torch.bfloat16}
    for _ in range(4):
        grads = [torch.randn(48, 16) for _ in ours]
        muon_update(ours, grads, buffer_GRC, scale=0.5, **settings)
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = 0.5 * grad
        reference.step()
    for a, b, s in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.02 * (b - s).norm()


def test_decay_uses_the_shape_adjusted_learning_rate() -> None:
    models = [gpt(), gpt()]
    for model, decay in zip(models, (0.0, 0.5), strict=True):
        train(model, make(model, attrs.evolve(EXACT, matrix_weight_decay=decay)), range(1))
    start = dict(gpt().named_parameters())
    for name, factor in {"blocks.0.mlp.up.weight": 2.0, "blocks.0.attention.query.weight": 1.0}.items():
        free, decayed = (dict(m.named_parameters())[name] for m in models)
        torch.testing.assert_close(free - decayed, 0.02 * factor * 0.5 * start[name], rtol=1e-3, atol=1e-6)


def test_the_rest_moves_like_torch_optim_adamw() -> None:
    ours, theirs = gpt(), gpt()
    config = attrs.evolve(EXACT, weight_decay=0.1)
    train(ours, make(ours, config), range(4))
    width_factor = math.sqrt(768 / 32)
    groups = [
        {"params": [theirs.get_parameter("embedding.weight")], "lr": 0.2 * width_factor},
        {"params": [theirs.get_parameter("head.weight")], "lr": 0.004 * width_factor},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1, fused=True)
    muon = make(theirs, config)
    muon.adamw = {}
    for step in range(4):
        ids = torch.randint(0, 40, (8, 9), generator=torch.Generator().manual_seed(step % 3))
        theirs(ids[:, :-1], ids[:, 1:]).backward()
        for group in groups:
            group["params"][0].grad *= 1 / 64
        reference.step()
        muon.update(1 / 64, Multipliers(step=step, num_iterations=10, lr=1.0))
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_moments_of_a_bfloat16_parameter_are_float32() -> None:
    model = gpt(torch.bfloat16)
    optimizer = make(model)
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    assert {t.dtype for t in state.values()} == {torch.float32}
    kept = sum(t.nbytes for key, t in state.items() if not key.endswith("/step"))
    assert make(model).state_bytes() == kept  # known before the first update


def test_momentum_rises_linearly() -> None:
    optimizer = make(gpt())
    assert [optimizer.momentum(s) for s in (0, 150, 300, 1000)] == pytest.approx([0.85, 0.90, 0.95, 0.95])
    assert make(gpt(), attrs.evolve(EXACT, momentum_warmup_steps=0)).momentum(0) == 0.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_on_exactly_where_it_was_saved(dtype: torch.dtype) -> None:
    straight = gpt(dtype)
    train(straight, make(straight), range(4))
    first = gpt(dtype)
    optimizer = make(first)
    train(first, optimizer, range(2))
    state = {key: value.clone() for key, value in optimizer.state_dict().items()}
    second = gpt(dtype)
    second.load_state_dict(first.state_dict())
    resumed = make(second)
    resumed.load_state_dict(state)
    assert resumed.state_dict().keys() == state.keys()
    train(second, resumed, range(2, 4))
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_discarded_step_leaves_no_trace() -> None:
    model = gpt()
    optimizer = make(model)
    train(model, optimizer, range(1))
    before = {n: p.clone() for n, p in model.state_dict().items()}
    state = {k: t.clone() for k, t in optimizer.state_dict().items()}
    model(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)).backward()
    optimizer.reduce()
    optimizer.discard()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert all(torch.equal(state[k], t) for k, t in optimizer.state_dict().items())


class ThirdParty(Model):
    """Declares no roles."""

    vocab_size, hidden_size = 40, 16

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(40, 16)
        self.mix = nn.GRU(16, 16, batch_first=True)
        self.out = nn.Linear(16, 40)

    def hidden(self, ids_BT: Tensor, cache: object = None) -> Tensor:
        return self.mix(self.embedding(ids_BT))[0]

    def logits(self, hidden_ND: Tensor) -> Tensor:
        return self.out(hidden_ND)


def test_it_trains_a_third_party_model_by_its_roles() -> None:
    model = ThirdParty()
    losses = train(model, make(model), range(40))
    assert losses[-1] < 0.5 * losses[0]


def test_an_unknown_role_is_an_error_that_names_the_known_ones() -> None:
    class Odd(ThirdParty):
        def parameter_roles(self) -> dict[str, str]:
            return {**super().parameter_roles(), "out.bias": "bias"}

    with pytest.raises(
        PluginError, match=r"'out\.bias' of shape \(40,\) and role 'bias'.*matrix.*embedding, head, scalar"
    ):
        make(Odd())


def train_on(world: World, steps: int) -> dict[str, Tensor]:
    model = gpt()
    optimizer = make(model, world=world)
    train(model, optimizer, range(steps), world)
    return {**{n: p.detach() for n, p in model.named_parameters()}, **optimizer.state_dict()}


def test_two_ranks_give_the_parameters_and_state_of_one() -> None:
    ours = on_ranks(2, train_on, 3)
    alone = train_on(ALONE, 3)
    assert ours[0].keys() == ours[1].keys() == alone.keys()
    for name, expected in alone.items():
        assert torch.equal(ours[0][name], ours[1][name]), name
        torch.testing.assert_close(ours[0][name], expected, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
