"""``flops_per_token`` against torch's own count of what a training step dispatches."""

from __future__ import annotations

import attrs
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nanochat_core import ModelContext
from nanochat_gpt.config import GPTConfig
from nanochat_gpt.model import GPT, build

CLASSIC = {
    "classic": GPTConfig(depth=3, aspect_ratio=16, head_dim=16),
    "grouped queries": GPTConfig(depth=2, aspect_ratio=32, head_dim=16, n_kv_head=2),
    "width rounded up": GPTConfig(depth=5, aspect_ratio=16, head_dim=32),
    "no softcap": GPTConfig(depth=2, aspect_ratio=32, head_dim=16, softcap=0.0),  # another loss function
}
MODERN = GPTConfig(
    depth=3, aspect_ratio=24, head_dim=16, width_rounding="head_dim", rope_base=1e5, qk_scale=1.2, init="modern",
    value_embeddings=True, residual_scalars=True, backout=True,
)  # fmt: skip


def make(config: GPTConfig, vocab_size: int, T: int, dtype: torch.dtype = torch.float32) -> GPT:
    torch.manual_seed(0)
    return build(config, ModelContext(vocab_size, T, torch.device("cpu"), dtype))


def counted(model: GPT, rows: int, T: int) -> float:
    """FLOPs a token of a forward and backward pass, as torch counts its operations."""
    ids_BT = torch.randint(0, model.vocab_size, (rows, T))
    model(ids_BT, ids_BT).backward()  # the core's loss tries a head that it does not know on one position, once
    # The math backend is made of products that the counter knows; what torch takes on a CPU is not counted.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids_BT, ids_BT).backward()
    return counter.get_total_flops() / (rows * T)


@pytest.mark.parametrize("config", [*CLASSIC.values(), MODERN], ids=[*CLASSIC, "modern"])
# One product of all scores, and scaled_dot_product_attention.
@pytest.mark.parametrize("T", [32, 520])
def test_flops_per_token_is_what_torch_counts(config: GPTConfig, T: int) -> None:
    model = make(config, 128, T)
    assert counted(model, 2, T) == model.flops_per_token(T)


def test_bfloat16_counts_the_same() -> None:
    model = make(CLASSIC["classic"], 128, 32, torch.bfloat16)
    assert counted(model, 2, 32) == model.flops_per_token(32)


def test_rows_that_fill_the_head_up_are_counted_though_they_are_not_computed() -> None:
    """Parameters count, and the head has 64 rows for 50 tokens."""
    model = make(CLASSIC["classic"], 50, 32)
    assert model.flops_per_token(32) - counted(model, 2, 32) == pytest.approx(6 * 14 * model.hidden_size)


def test_the_gate_of_smear_is_not_counted() -> None:
    model = make(attrs.evolve(MODERN, smear=True), 128, 32)
    assert counted(model, 2, 32) - model.flops_per_token(32) == 6 * 24


def test_windows_count_what_is_in_sight() -> None:
    """The formula counts what a windowed backend computes; the math backend computes all scores and hides some."""
    model = make(attrs.evolve(MODERN, depth=4, window_pattern="SSL", window=8), 128, 32)
    layers = 2  # S, S, L, and the last one L whatever the pattern says
    assert counted(model, 2, 32) - model.flops_per_token(32) == layers * 12 * model.hidden_size * (32 - 8)
