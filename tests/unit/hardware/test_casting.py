"""Dtypes by name, autocast; weights that don't change are cast once, and nobody sees an old cast."""

from __future__ import annotations

import threading

import pytest
import torch

from nanochat_core import cast, kept_at_rest
from nanochat_core.hardware.casting import autocast, dtype_of, name_of, weights_at_rest

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


def test_what_is_made_of_weights_is_kept_while_they_rest():
    w, made = weight(), []

    def make():
        made.append(w.sum().item())
        return made[-1]

    with torch.no_grad():
        assert kept_at_rest(make, [w]) is None
        casts = {}
        with weights_at_rest(casts):
            assert kept_at_rest(make, [w], only_if_made=True) is None
            assert kept_at_rest(make, [w]) == kept_at_rest(make, [w]) == w.sum().item()
        with weights_at_rest(casts):
            assert kept_at_rest(make, [w], only_if_made=True) == made[0]
            w.add_(1)
            assert kept_at_rest(make, [w]) == w.sum().item()
    assert len(made) == 2
    with weights_at_rest():
        assert kept_at_rest(make, [w]) is None  # with gradients


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


def test_casts_are_kept_for_the_thread_alone():
    w, kept = weight(), list[torch.Tensor]()

    def elsewhere() -> None:
        with torch.no_grad():
            kept.extend(cast(w, BF16) for _ in range(2))

    with torch.no_grad(), weights_at_rest():
        cast(w, BF16)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert kept[0] is not kept[1]


def test_a_cast_can_be_compiled_as_a_part_of_one_graph():
    w = weight()
    compiled = torch.compile(lambda x: x.to(BF16) @ cast(w, BF16).T, fullgraph=True, backend="eager")
    x = torch.ones(1, 2)
    assert torch.equal(compiled(x), x.to(BF16) @ w.to(BF16).T)
    with torch.no_grad(), weights_at_rest():
        assert torch.equal(compiled(x), x.to(BF16) @ w.to(BF16).T)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_dtype_has_a_name(name: str):
    assert name_of(dtype_of(name)) == name
    assert dtype_of(name).is_floating_point


@pytest.mark.parametrize("name", ["nonsense", "auto", "nn", "tensor"])
def test_what_is_no_dtype_is_refused(name: str):
    with pytest.raises((AttributeError, TypeError)):
        dtype_of(name)


def test_autocast_is_off_for_float32():
    x = torch.ones(2, 2)
    with autocast(x.device, torch.float32):
        assert (x @ x).dtype is torch.float32
    with autocast(x.device, BF16):
        assert (x @ x).dtype is BF16
        with autocast(x.device, torch.float32):
            assert (x @ x).dtype is torch.float32
