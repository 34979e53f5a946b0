"""The update of ``muon_adamw`` with one rank, against other implementations and plain float64 readings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import attrs
import pytest
import torch
from helpers.recipes import MODERN_MUON
from torch import Tensor, nn

from nanochat_core import ConfigError, Model, ModelContext, Multipliers, OptimizerContext, PluginError, World
from nanochat_gpt.config import GPTConfig
from nanochat_gpt.model import build as build_gpt
from nanochat_muon.config import MuonAdamWConfig
from nanochat_muon.muon import muon_update, orthogonalize
from nanochat_muon.optimizer import MuonAdamW, build

ALONE = World(0, 1, torch.device("cpu"))
EXACT = MuonAdamWConfig(ns_dtype="float32")
# one parameter or two of every role: matrices tall, wide, square and flat
SHAPES = {
    "embedding": (12, 6),
    "tall": (9, 4),
    "tall2": (9, 4),
    "wide": (4, 9),
    "wide2": (4, 9),
    "square": (6, 6),
    "gate": (2, 12),
    "value": (12, 5),
    "head": (11, 6),
    "residual": (3,),
    "x0": (3,),
    "smear": (1, 24),
    "gain": (6,),
}
ROLES = {
    "embedding": "embedding",
    "value": "embedding.value",
    "head": "head",
    "residual": "scalar.residual",
    "x0": "scalar.x0",
    "smear": "scalar.smear",
    "gain": "scalar",
}


def bag(dtype: torch.dtype = torch.float64) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {n: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in SHAPES.items()}


def make(parameters: Mapping[str, nn.Parameter], config: MuonAdamWConfig = EXACT, **known: Any) -> MuonAdamW:
    roles = {name: ROLES.get(name, "matrix") for name in parameters}
    facts = {"hidden_size": 192, "world": ALONE, "total_batch_size": 2**18, "num_iterations": 8}
    return build(config, OptimizerContext(parameters, roles, **{**facts, **known}))


def gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()}


def multipliers(step: int) -> Multipliers:
    return Multipliers(step, 8, lr=1.0 - 0.1 * step, warmdown=max(0.0, (step - 3) / 4))


def move(parameters: Mapping[str, nn.Parameter], optimizer: MuonAdamW, steps: range) -> None:
    for step in steps:
        for name, gradient in gradients(step).items():
            parameters[name].grad = 4.0 * gradient.to(parameters[name].dtype)
        optimizer.reduce()
        optimizer.update(0.25, multipliers(step))


# -- orthogonalisation


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 64, 32), (2, 32, 64), (2, 48, 40)])
def test_polar_express_is_near_the_polar_factor(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Of G = U S V^T that is U V^T: the same singular vectors, and values that five steps bring within 0.142 of 1."""
    torch.manual_seed(0)
    g_GRC = torch.randn(shape, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(g_GRC, full_matrices=False)
    assert (s[:, 0] / s[:, -1]).max() < 50
    ours = orthogonalize(g_GRC, 5, dtype, polar_express=True).double()
    rounding = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.06}[dtype]
    turned = u.mT @ ours @ vt.mT  # diagonal where the singular vectors are the same
    singular = turned.diagonal(dim1=1, dim2=2)
    assert (turned - torch.diag_embed(singular)).abs().max() < rounding
    assert (singular - 1).abs().max() < 0.1415 + rounding


def test_polar_express_of_a_badly_conditioned_matrix() -> None:
    """Singular values of a few thousandths come near 1 too, where Newton-Schulz leaves them low."""
    torch.manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(1, 32, 32, dtype=torch.float64))
    g_GRC = u @ torch.diag_embed(torch.logspace(0, -2.7, 32, dtype=torch.float64)[None]) @ vt
    lowest = [
        torch.linalg.svdvals(orthogonalize(g_GRC, 5, torch.float64, polar_express=p)).min() for p in (True, False)
    ]
    assert lowest[0] > 0.85
    assert lowest[1] < 0.6


@pytest.mark.parametrize("polar_express", [False, True])
@pytest.mark.parametrize("row_equilibration", [False, True])
def test_orthogonalisation_in_bfloat16_is_close_and_zero_stays_zero(
    polar_express: bool, row_equilibration: bool
) -> None:
    torch.manual_seed(0)
    g_GRC = torch.randn(2, 64, 32)
    options = {"polar_express": polar_express, "row_equilibration": row_equilibration}
    exact, rough = (orthogonalize(g_GRC, 5, dtype, **options).float() for dtype in (torch.float32, torch.bfloat16))
    assert (exact - rough).norm() / exact.norm() < 0.03
    assert torch.count_nonzero(orthogonalize(torch.zeros(1, 4, 4), 5, torch.bfloat16, **options)) == 0


def test_matrices_move_like_torch_optim_muon() -> None:
    """For equal settings; torch's decay is the same for square matrices only. Both orthogonalise in bfloat16."""
    torch.manual_seed(0)
    ours = [torch.randn(48, 16), torch.randn(48, 16), torch.randn(48, 16)]
    theirs = [nn.Parameter(p.clone()) for p in ours]
    start = [p.clone() for p in ours]
    reference = torch.optim.Muon(theirs, lr=0.03, weight_decay=0.0, momentum=0.9, nesterov=True)
    buffer_GRC = torch.zeros(3, 48, 16)
    settings = {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.0, "dtype": torch.bfloat16}
    for _ in range(4):
        grads = [torch.randn(48, 16) for _ in ours]
        muon_update(ours, grads, buffer_GRC, None, MuonAdamWConfig(), scale=0.5, **settings)
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = 0.5 * grad
        reference.step()
    for a, b, s in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.02 * (b - s).norm()


# -- the whole update of matrices


def plain_muon(p: Tensor, steps: range, name: str, c: MuonAdamWConfig) -> Tensor:
    """One float64 matrix after some steps, written down as the recipe says it, one thing at a time."""
    rows, columns = p.shape
    along = 1 if rows >= columns else 0  # second moments: one a row, or one a column of a wide matrix
    buffer, moment = torch.zeros_like(p), torch.zeros_like(p.mean(along, keepdim=True))
    for step in steps:
        end = c.momentum if c.momentum_end == "auto" else c.momentum_end
        aim = c.momentum + (end - c.momentum) * multipliers(step).warmdown
        m = c.momentum_start + (aim - c.momentum_start) * min(1.0, step / c.momentum_warmup_steps)
        gradient = gradients(step)[name]
        buffer = m * buffer + (1 - m) * gradient
        x = (1 - m) * gradient + m * buffer
        if c.row_equilibration:
            norms = x.norm(dim=1, keepdim=True)
            x = x / norms * norms.mean()
        x = x / (x.norm() * (1.01 if c.polar_express else 1))
        for i in range(c.ns_steps):
            a, b, d = PAPER[i] if c.polar_express else (3.4445, -4.7750, 2.0315)
            x = a * x + b * (x @ x.T @ x) + d * (x @ x.T @ x @ x.T @ x)
        if c.renormalize:
            x = x * (min(rows, columns) ** 0.5 / x.norm())
        if c.variance_reduction:
            before = x.norm()
            moment = c.variance_beta2 * moment + (1 - c.variance_beta2) * (x**2).mean(along, keepdim=True)
            x = x / moment.sqrt()
            x = x * (before / x.norm())
        lr = c.matrix_lr * c.lr_scale * multipliers(step).lr * max(1.0, rows / columns) ** 0.5
        decay = c.matrix_weight_decay * c.matrix_weight_decay_scale
        if c.matrix_weight_decay_schedule == "cosine":
            decay *= (1 + math.cos(math.pi * step / 8)) / 2
        decayed = torch.where(x * p >= 0, p, 0) if c.cautious_weight_decay else p
        p = p - lr * x - lr * decay * decayed
    return p


PAPER = [  # arXiv:2505.16932, safety 2e-2, cushion 2
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"polar_express": True},
        {"polar_express": True, "ns_steps": 3},
        {"row_equilibration": True},
        {"renormalize": True},
        {"variance_reduction": True, "variance_beta2": 0.7},
        {"variance_reduction": True, "renormalize": True},
        {"matrix_weight_decay": 0.5},
        {"matrix_weight_decay": 0.5, "cautious_weight_decay": True},
        {"matrix_weight_decay": 0.5, "matrix_weight_decay_schedule": "cosine"},
        {"matrix_weight_decay": 0.5, "matrix_weight_decay_scale": 0.3},
        {"lr_scale": 0.6, "matrix_weight_decay": 0.5},
        {"momentum": 0.97, "momentum_warmup_steps": 3, "momentum_end": 0.9},
        MODERN_MUON,
    ],
    ids=lambda options: "modern" if options is MODERN_MUON else "+".join(options) or "classic",
)
def test_matrices_move_as_the_formulas_say(options: dict[str, Any]) -> None:
    config = MuonAdamWConfig(**options)
    parameters = bag()
    start = {name: p.detach().clone() for name, p in parameters.items()}
    move(parameters, make(parameters, config), range(6))
    for name in ("tall", "tall2", "wide", "wide2", "square", "gate"):
        expected = plain_muon(start[name], range(6), name, config)
        assert (expected - start[name]).norm() > 0.02
        torch.testing.assert_close(parameters[name].detach(), expected, rtol=0, atol=1e-9, msg=lambda m, n=name: n + m)


def test_dead_rows_do_no_harm() -> None:
    """Rows without gradient stay where they are; a matrix without any too."""
    parameters = bag(torch.float32)
    optimizer = make(parameters, MuonAdamWConfig(**{**MODERN_MUON, "matrix_weight_decay": 0.0}))
    start = {name: p.detach().clone() for name, p in parameters.items()}
    for step in range(3):
        for name, gradient in gradients(step).items():
            parameters[name].grad = gradient.float()
        parameters["wide"].grad[1] = 0
        parameters["square"].grad = None
        optimizer.reduce()
        optimizer.update(1.0, multipliers(step))
    assert all(torch.isfinite(p).all() for p in parameters.values())
    assert torch.equal(parameters["wide"][1], start["wide"][1])
    assert torch.equal(parameters["square"], start["square"])


# -- AdamW


@pytest.mark.parametrize(
    "options", [{"weight_decay": 0.1}, {**MODERN_MUON, "lr_scale": 0.5}], ids=["classic", "modern"]
)
def test_the_rest_moves_like_torch_optim_adamw(options: dict[str, Any]) -> None:
    config = MuonAdamWConfig(**options)
    parameters, theirs = bag(), bag()
    scale = config.lr_scale
    wide = scale * math.sqrt(768 / 192)
    rows = {  # learning rate, betas, decay
        "embedding": (config.embedding_lr * wide, (0.8, 0.95), 0.1),
        "value": (config.embedding_lr / 2 * wide, (0.8, 0.95), 0.1),
        "head": (config.unembedding_lr * wide, (0.8, 0.95), 0.1),
        "residual": (0.005 * scale, (0.8, 0.95), 0.0),
        "x0": (0.5 * scale, (0.8, 0.95), 0.0),
        "gain": (0.5 * scale, (0.8, 0.95), 0.0),
        "smear": (0.2, (0.8, 0.95), 0.0),
    }
    if config.polar_express:
        rows |= {
            "embedding": (0.3 * wide, (0.8, 0.995), 0.001),
            "value": (0.15 * wide, (0.8, 0.995), 0.01),
            "head": (0.008 * wide, (0.8, 0.96), 0.01),
            "residual": (0.005 * scale, (0.8, 0.95), 0.05),
            "x0": (0.5 * scale, (0.96, 0.95), 0.0),
        }
    groups = [
        {"params": [theirs[n]], "lr": lr, "base": lr, "betas": betas, "weight_decay": decay}
        for n, (lr, betas, decay) in rows.items()
    ]
    reference = torch.optim.AdamW(groups, eps=1e-10)
    for step in range(6):
        for group in reference.param_groups:
            group["lr"] = group["base"] * multipliers(step).lr
        for name, gradient in gradients(step).items():
            theirs[name].grad = gradient
        reference.step()
    move(parameters, make(parameters, config), range(6))
    for name in rows:
        torch.testing.assert_close(parameters[name], theirs[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: n + m)


def test_moments_are_float32_and_their_size_is_known_before() -> None:
    parameters = bag(torch.bfloat16)
    optimizer = make(parameters, MuonAdamWConfig(**MODERN_MUON))
    planned = optimizer.state_bytes()
    move(parameters, optimizer, range(2))
    state = optimizer.state_dict()
    assert {t.dtype for t in state.values()} == {torch.float32}
    assert planned == sum(t.nbytes for key, t in state.items() if not key.endswith("/step"))
    assert state["tall/variance"].shape == (9, 1)
    assert state["wide/variance"].shape == (1, 9)


# -- schedules, scales, what the user is told


def test_momentum_rises_and_falls_linearly() -> None:
    from nanochat_muon.settings import fill_in, momentum, resolve

    def at(step: int, warmdown: float, **options: Any) -> float:
        config = MuonAdamWConfig(**options)
        return momentum(fill_in(config, resolve(config, CONTEXT)), step, warmdown)

    assert [at(s, 0.0) for s in (0, 150, 300, 1000)] == pytest.approx([0.85, 0.90, 0.95, 0.95])
    assert at(0, 0.0, momentum_warmup_steps=0) == at(1000, 1.0) == 0.95
    assert at(150, 0.5) == at(150, 0.0)  # without an end of its own the warmdown changes nothing
    speedrun = {"momentum": 0.97, "momentum_warmup_steps": 400, "momentum_end": 0.9}
    found = [at(s, w, **speedrun) for s, w in ((0, 0), (200, 0), (400, 0), (2000, 0.5), (4000, 1))]
    assert found == pytest.approx([0.85, 0.91, 0.97, 0.935, 0.90])


CONTEXT = OptimizerContext({}, {}, 768, ALONE, 2**19, 100, 1.0)


def data(depth: int) -> int:
    """Block matrices and head at vocabulary 32,768: the data : parameter ratio counts them."""
    width = 64 * depth
    return 12 * depth * width**2 + 32768 * width


@pytest.mark.parametrize(
    ("depth", "batch", "decay"), [(4, 2**18, 1.89), (8, 2**18, 0.52), (12, 2**19, 0.28), (20, 2**20, 0.100)]
)
def test_scaling_rules_give_the_recipes_table(depth: int, batch: int, decay: float) -> None:
    config = MuonAdamWConfig(
        lr_scale="auto", matrix_weight_decay=0.28, matrix_weight_decay_scale="auto", cautious_weight_decay=True
    )
    facts = {"total_batch_size": batch, "relative_data": data(depth) / data(12), "hidden_size": 64 * depth}
    optimizer = make(bag(torch.float32), config, **facts)
    resolved = optimizer.resolved_options()
    assert resolved["lr_scale"].value == pytest.approx((batch / 2**19) ** 0.5)
    assert 0.28 * resolved["matrix_weight_decay_scale"].value == pytest.approx(decay, rel=0.01)
    assert "D12 / D" in resolved["matrix_weight_decay_scale"].formula
    told = str(optimizer.describe()["matrix decay"])
    assert f"{0.28 * resolved['matrix_weight_decay_scale'].value:.3g}, cautious" in told
    assert "follow the data : parameter ratio" in told
    assert ("warning: above 1" in told) == (decay > 1)


def test_every_auto_is_named_with_a_formula_and_gives_the_same_when_written_out() -> None:
    resolved = make(bag()).resolved_options()
    auto = {a.name for a in attrs.fields(MuonAdamWConfig) if a.default == "auto"} - {"ns_dtype"}
    assert set(resolved) == auto
    assert all(r.formula for r in resolved.values())
    parameters, again = bag(), bag()
    move(parameters, make(parameters), range(2))
    move(again, make(again, attrs.evolve(EXACT, **{n: r.value for n, r in resolved.items()})), range(2))
    assert all(torch.equal(parameters[n], again[n]) for n in parameters)


def test_the_banner_gives_learning_rates_of_roles_that_are_there() -> None:
    rows = make(bag()).describe()
    assert rows == {
        "learning rates": "matrix 0.02, embedding 0.4, embedding.value 0.2, head 0.008, scalar 0.5, scalar.x0 0.5, "
        "scalar.residual 0.005, scalar.smear 0.2"
    }
    few = {name: p for name, p in bag().items() if name in ("embedding", "head", "tall")}
    assert make(few).describe() == {"learning rates": "matrix 0.02, embedding 0.4, head 0.008"}


def test_decay_by_data_needs_a_model_with_a_reference() -> None:
    with pytest.raises(ConfigError, match=r"^matrix_weight_decay_scale: this model has no reference"):
        make(bag(), MuonAdamWConfig(matrix_weight_decay_scale="auto"))


def test_polar_express_has_five_steps() -> None:
    with pytest.raises(ValueError, match="ns_steps must be at most 5 with polar_express"):
        MuonAdamWConfig(polar_express=True, ns_steps=6)
    MuonAdamWConfig(ns_steps=6)


# -- roles


@pytest.mark.parametrize(("role", "same"), [("embedding.odd", "embedding"), ("scalar.new", "scalar")])
def test_an_unknown_refinement_goes_by_its_base(role: str, same: str) -> None:
    results = []
    for which in (role, same):
        parameter = nn.Parameter(torch.ones(4, 3))
        context = attrs.evolve(CONTEXT, parameters={"p": parameter}, roles={"p": which})
        optimizer = build(MuonAdamWConfig(), context)
        parameter.grad = torch.ones(4, 3)
        optimizer.update(1.0, multipliers(0))
        results.append(parameter.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize(("shape", "role"), [((40,), "bias"), ((40,), "matrix"), ((2, 3, 4), "matrix.stacked")])
def test_an_unknown_role_is_an_error_that_names_the_known_ones(shape: tuple[int, ...], role: str) -> None:
    context = attrs.evolve(CONTEXT, parameters={"out.bias": nn.Parameter(torch.ones(shape))}, roles={"out.bias": role})
    with pytest.raises(
        PluginError, match=rf"'out\.bias' of shape .* and role '{role}'.*matrix.*embedding, head, scalar"
    ):
        build(MuonAdamWConfig(), context)


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


def gpt(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    config = GPTConfig(depth=2, aspect_ratio=16, head_dim=16, n_kv_head=1)
    return build_gpt(config, ModelContext(40, 8, torch.device("cpu"), dtype))


def make_for(model: Model, config: MuonAdamWConfig = EXACT) -> MuonAdamW:
    parameters = dict(model.named_parameters())
    return build(config, OptimizerContext(parameters, model.parameter_roles(), model.hidden_size, ALONE, 64, 10))


def train(model: Model, optimizer: MuonAdamW, steps: range) -> list[float]:
    losses = []
    for step in steps:
        ids = torch.randint(0, 40, (8, 9), generator=torch.Generator().manual_seed(step % 3))
        optimizer.begin_reduce()
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        losses.append(loss.item())
        optimizer.reduce()
        optimizer.update(1 / 64, Multipliers(step=step, num_iterations=10, lr=1.0))
    return losses


def test_it_trains_a_third_party_model_by_its_roles() -> None:
    model = ThirdParty()
    losses = train(model, make_for(model), range(40))
    assert losses[-1] < 0.5 * losses[0]


# -- state


@pytest.mark.parametrize("options", [{}, MODERN_MUON], ids=["classic", "modern"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_on_exactly_where_it_was_saved(dtype: torch.dtype, options: dict[str, Any]) -> None:
    config = MuonAdamWConfig(**options)
    straight = gpt(dtype)
    train(straight, make_for(straight, config), range(4))
    first = gpt(dtype)
    optimizer = make_for(first, config)
    train(first, optimizer, range(2))
    state = {key: value.clone() for key, value in optimizer.state_dict().items()}
    second = gpt(dtype)
    second.load_state_dict(first.state_dict())
    resumed = make_for(second, config)
    resumed.load_state_dict(state)
    assert resumed.state_dict().keys() == state.keys()
    train(second, resumed, range(2, 4))
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_discarded_step_leaves_no_trace() -> None:
    model = gpt()
    optimizer = make_for(model)
    train(model, optimizer, range(1))
    before = {n: p.clone() for n, p in model.state_dict().items()}
    state = {k: t.clone() for k, t in optimizer.state_dict().items()}
    model(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)).backward()
    optimizer.reduce()
    optimizer.discard()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert all(torch.equal(state[k], t) for k, t in optimizer.state_dict().items())
