"""The model's options: gradients, attention backends, float8, recomputation, initial weights, contradictions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.gpt_reading import ALL, OPTIONS, SMALL, THREE, VOCAB, T, batch, make
from torch import Tensor

from nanochat_core import ModelContext
from nanochat_core.testing import check_model
from nanochat_gpt.attention import attend, choose_backend, make_masking
from nanochat_gpt.cache import Past
from nanochat_gpt.config import GPTConfig
from nanochat_gpt.fp8 import fp8_linear, quantize
from nanochat_gpt.head import plain_loss_and_gradient, softcap_cross_entropy
from nanochat_gpt.model import build

CPU = torch.device("cpu")
EVERY = {name: value for option in OPTIONS.values() for name, value in option.items()}


@pytest.mark.parametrize("options", [{}, *OPTIONS.values(), {"softcap": 0.0}], ids=["classic", *OPTIONS, "no softcap"])
def test_gradients_equal_finite_differences(options: dict[str, Any]) -> None:
    """Along a random direction of each parameter, central differences in float64."""
    model = make(GPTConfig(**THREE | options))
    ids, targets = batch()
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(model(ids, targets), list(parameters.values()))
    generator = torch.Generator().manual_seed(5)
    step = 1e-6
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        losses = []
        with torch.no_grad():
            for sign in (1, -2, 1):  # forward, back beyond the start, home
                parameter += sign * step * direction
                losses.append(model(ids, targets).item())
        expected = (losses[0] - losses[1]) / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_backends_agree(window: int | None, kv_heads: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(h, 2, 16, 8, dtype=torch.float64) for h in (4, kv_heads, kv_heads))
    results = {}
    for backend in ("matrix", "sdpa"):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        y = attend(*inputs, make_masking(backend, window, 16, Past(), True, torch.float64, CPU))
        results[backend] = [y.detach(), *torch.autograd.grad(y.square().sum(), inputs)]
    for a, b in zip(*results.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_flex_attention_agrees_forward() -> None:
    """It has no backward pass on a CPU."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(h, 2, 16, 8) for h in (4, 2, 2))
    with torch.no_grad():
        a, b = (attend(q, k, v, make_masking(x, 3, 16, Past(), True, torch.float32, CPU)) for x in ("flex", "sdpa"))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_the_backend_depends_on_device_dtype_and_length() -> None:
    def chosen(length: int, dtype: torch.dtype, wanted: str = "auto", window: int | None = None) -> str:
        return choose_backend(wanted, CPU, dtype, length, window)[0]

    assert chosen(512, torch.bfloat16) == "matrix"
    assert chosen(512, torch.float32) == "sdpa"
    assert chosen(513, torch.bfloat16, window=100) == "sdpa"
    assert chosen(64, torch.float32, "sdpa") == "sdpa"


def test_a_run_is_told_what_computes_attention() -> None:
    config = GPTConfig(depth=4, aspect_ratio=16, head_dim=16, window_pattern="SSSL")
    rows = build(config, ModelContext(VOCAB, 1024, CPU, torch.float32)).describe()
    assert rows["attention"] == (
        "3 of 4 layers attend to 256 earlier tokens: sdpa (torch's scaled_dot_product_attention); "
        "sdpa (torch's scaled_dot_product_attention)"
    )


@pytest.mark.parametrize(("length", "window"), [(2048, 512), (512, 128), (256, 128), (3000, 768)])
def test_the_window_is_a_quarter_of_the_context_up_to_a_multiple_of_128(length: int, window: int) -> None:
    config = GPTConfig(depth=6, window_pattern="SSL")
    assert config.windows(length) == (window, window, None, window, window, None)
    model = build(GPTConfig(depth=2, window_pattern="S"), ModelContext(VOCAB, length, CPU, torch.float32))
    assert model.windows == (window, None)  # the last layer always sees everything
    assert model.resolved_options()["window"].value == window
    assert model.flops_per_token(length) == 6 * (2 * 12 * 128**2 + 64 * 128) + 12 * 128 * (window + length)


def test_windowed_layers_really_forget() -> None:
    config = GPTConfig(depth=2, aspect_ratio=16, head_dim=16, window_pattern="S", window=3)
    model = make(config)
    ids, _ = batch(1, 12)
    other = ids.clone()
    other[0, 0] = (other[0, 0] + 1) % VOCAB
    last = model.blocks[1].attention.output.weight  # without the last layer's attention, two layers see 3 tokens back
    torch.nn.init.zeros_(last)
    with torch.no_grad():
        a, b = model.hidden(ids), model.hidden(other)
    assert not torch.equal(a[0, 3], b[0, 3])
    torch.testing.assert_close(a[0, 4:], b[0, 4:], rtol=0, atol=0)


@pytest.mark.parametrize("config", [SMALL, ALL])
def test_a_cache_set_back_goes_on_as_if_it_had_never_read_further(config: GPTConfig) -> None:
    model = make(config)
    ids, _ = batch(2)
    other, _ = batch(2, seed=9)
    cache = model.new_cache(2, T)
    with torch.no_grad():
        model.hidden(torch.cat([ids[:, :3], other[:, 3:6]], 1), cache)
        cache.length = 3
        continued = model.hidden(ids[:, 3:], cache)
        expected = model.hidden(ids)[:, 3:]
    torch.testing.assert_close(continued, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("config", [SMALL, ALL])
@pytest.mark.parametrize("compiled", [False, True])
def test_recomputed_activations_give_the_same_gradients_and_keep_less(config: GPTConfig, compiled: bool) -> None:
    ids, targets = batch()
    results, kept = [], []
    for recompute in (False, True):
        model = make(config)
        if recompute:
            model.checkpoint_activations()
        if compiled:
            model.compile_training(backend="eager")
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(ids, targets)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
        kept.append(sum(sizes))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert kept[1] < 0.6 * kept[0]


def test_float8_products_are_close_and_so_are_their_gradients() -> None:
    torch.manual_seed(0)
    x, w, dy = torch.randn(32, 64), torch.randn(48, 64), torch.randn(32, 48)
    results = []
    for function in (lambda x, w: torch.nn.functional.linear(x, w), lambda x, w: fp8_linear(x, w, torch.bfloat16)):
        inputs = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = function(*inputs)
        y.backward(dy.to(y.dtype))
        results.append([y.detach().float(), *(i.grad for i in inputs)])
    for exact, rough, error in zip(*results, (0.05, 0.09, 0.09), strict=True):
        assert (exact - rough).norm() / exact.norm() < error


@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e30, 0.0])
def test_a_float8_tensor_uses_the_whole_range(factor: float) -> None:
    x = factor * torch.tensor([0.5, -1.0, 0.25])
    small, scale = quantize(x, torch.float8_e4m3fn)
    assert torch.isfinite(small.float()).all()
    if factor >= 1:
        assert small.float().abs().max() == 448
        torch.testing.assert_close(small.float() * scale, x, rtol=1e-6, atol=0)
    else:
        torch.testing.assert_close(small.float() * scale, x, rtol=0, atol=1e-12)


def test_the_formula_that_gpus_compile_is_the_one_that_cpus_compute() -> None:
    torch.manual_seed(0)
    h, w = torch.randn(12, 16, requires_grad=True), torch.randn(40, 16)
    targets = torch.randint(40, (12,))
    targets[[2, 7]] = -1
    loss = softcap_cross_entropy(h, w, targets, 15.0, torch.float32)
    (dh,) = torch.autograd.grad(loss, h)
    total, dz = plain_loss_and_gradient(h.detach() @ (w / 15.0).T, targets[:, None], 15.0)
    torch.testing.assert_close(total, loss.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dz @ w, dh, rtol=1e-5, atol=1e-5)


def test_all_options_in_bfloat16_are_close_to_float32() -> None:
    config = GPTConfig(**EVERY | {"depth": 3, "aspect_ratio": 32, "head_dim": 32})
    exact, rough = make(config, torch.float32), make(config, torch.bfloat16)
    rough.load_state_dict(exact.state_dict())
    stored = {n for n, p in rough.named_parameters() if p.dtype == torch.bfloat16}
    assert stored == {"embedding.weight", "value_embeddings.0.weight", "value_embeddings.2.weight"}
    ids, targets = batch(8)
    losses = [model(ids, targets) for model in (exact, rough)]
    for loss in losses:
        loss.backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-2)
    for (name, a), b in zip(exact.named_parameters(), rough.parameters(), strict=True):
        if a.numel() > 40:  # of a few numbers each is noisy
            assert torch.nn.functional.cosine_similarity(a.grad.flatten(), b.grad.float().flatten(), dim=0) > 0.98, name


def test_the_modern_init() -> None:
    torch.manual_seed(0)
    config = GPTConfig(**EVERY | {"depth": 4, "aspect_ratio": 64, "head_dim": 64, "init": "modern"})
    model = build(config, ModelContext(VOCAB, T, CPU, torch.float32))
    weights = dict(model.named_parameters())

    def has_std(name: str, std: float) -> None:
        assert weights[name].std().item() == pytest.approx(std, rel=0.05), name

    has_std("embedding.weight", 0.8)
    has_std("head.weight", 0.001)
    for kind in ("query", "key", "value"):
        has_std(f"blocks.1.attention.{kind}.weight", 256**-0.5)
        assert weights[f"blocks.1.attention.{kind}.weight"].abs().max() <= math.sqrt(3 / 256)
    has_std("blocks.1.mlp.up.weight", 0.4 * 256**-0.5)
    has_std("value_embeddings.3.weight", 256**-0.5)
    for name in ("attention.output", "mlp.down"):
        assert not weights[f"blocks.2.{name}.weight"].any()
    torch.testing.assert_close(
        model.residual_scalars.detach(), torch.tensor([1.15, 1.15 - 0.1 / 3, 1.05 + 0.1 / 3, 1.05])
    )
    torch.testing.assert_close(model.x0_scalars.detach(), torch.tensor([0.2, 0.15, 0.1, 0.05]))
    assert model.backout_factor.item() == pytest.approx(0.2)
    assert model.smear_factor.item() == 0
    for name in ("smear_gate.weight", "blocks.3.attention.value_gate.weight"):
        assert 0 <= weights[name].min() <= weights[name].max() <= 0.02


def test_roles_and_counts_of_the_speedrun_model() -> None:
    config = GPTConfig(
        depth=24, window_pattern="SSSL", value_embeddings=True, residual_scalars=True, smear=True, backout=True,
        width_rounding="head_dim", init="modern",
    )  # fmt: skip
    with torch.device("meta"):
        model = build(config, ModelContext(32768, 2048, torch.device("cuda"), torch.bfloat16))
    roles = model.parameter_roles()
    assert {r: sum(1 for x in roles.values() if x == r) for r in set(roles.values())} == {
        "embedding": 1, "embedding.value": 12, "head": 1, "matrix": 24 * 6 + 12, "scalar.residual": 1, "scalar.x0": 1,
        "scalar.smear": 3,
    }  # fmt: skip
    counts = model.parameter_counts()
    assert counts["matrix"] + counts["head"] == 24 * 12 * 1536**2 + 12 * 12 * 12 + 32768 * 1536
    assert counts["embedding"] == 13 * 32768 * 1536
    attention = 12 * 1536 * (6 * 2048 + 18 * 512)
    assert model.flops_per_token(2048) == 6 * (counts["matrix"] + counts["head"]) + attention


def test_the_contract_holds_with_all_options() -> None:
    check_model(build, ALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_pattern": "SX"}, 'window_pattern must consist of S and L, such as "SSSL", not "SX"'),
        ({"window": 7}, 'window must be "auto": window_pattern "L" has no layer with a window'),
        ({"window_pattern": ""}, "window_pattern must consist of S and L"),
        ({"depth": 1, "aspect_ratio": 16, "smear": True}, "smear must be false: its gate reads 24 channels, the width"),
        ({"depth": 1, "aspect_ratio": 8, "value_embeddings": True}, "value_embeddings must be false"),
        ({"width_rounding": "head_dim", "n_head": 4}, 'n_head must be "auto" or 10 with width_rounding'),
        ({"width_rounding": "head_dim", "head_dim": 63}, "head_dim must be even"),
        ({"depth": 1, "aspect_ratio": 40, "head_dim": 40, "fp8": True}, "fp8 must be false: it needs a width"),
    ],
)
def test_contradictions_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**options)


def test_what_the_device_lacks_is_said() -> None:
    def problems(**options: Any) -> dict[str, str]:
        config = GPTConfig(depth=1, aspect_ratio=64, head_dim=32, **options)
        return dict(build(config, ModelContext(VOCAB, T, CPU, torch.bfloat16)).unsupported())

    assert problems() == {}
    assert problems(fp8=True) == {"fp8": "it needs a Hopper or newer GPU, this is a CPU device: set it to false"}
    assert problems(attention="flash3")["attention"].endswith('it needs a Hopper GPU; set it to "auto"')
    assert problems(attention="flex")["attention"].endswith('set it to "auto"')
