"""Weights that don't change are cast once, and nobody sees an old cast."""

from __future__ import annotations

import torch

from nanochat_core import cast
from nanochat_core.hardware.casting import weights_at_rest

BF16 = torch.bfloat16


def weight() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(3, 2))


def test_cast_once_while_weights_rest():
    w = weight()
    with torch.no_grad():
        assert cast(w, BF16) is not cast(w, BF16)
        with weights_at_rest():
            kept = cast(w, BF16)
            assert torch.equal(kept, w.to(BF16))
            with weights_at_rest():
                assert cast(w, BF16) is kept
            assert cast(w, BF16) is kept
            assert cast(w, torch.float64).dtype is torch.float64
            assert cast(w, torch.float32) is w
        assert cast(w, BF16) is not kept


def test_a_changed_weight_is_cast_anew():
    w = weight()
    with torch.no_grad(), weights_at_rest():
        cast(w, BF16)
        w.add_(1)
        assert torch.equal(cast(w, BF16), w.to(BF16))


def test_gradients_flow():
    w = weight()
    with weights_at_rest():
        with torch.no_grad():
            cast(w, BF16)
        cast(w, BF16).sum().backward()
    assert w.grad is not None
