"""Draws follow the truncated softmax, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nanochat_core import Request
from nanochat_core.generation.sampler import Sampler

LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.2, 0.0, 1.9, -3.0])
CPU = torch.device("cpu")


def expected(temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """Probabilities by a plain reading of what the parameters mean."""
    p = (LOGITS.double() / temperature).softmax(0)
    kept = sorted(range(len(p)), key=lambda i: -p[i])[:top_k]
    p = torch.tensor([p[i] if i in kept else 0 for i in range(len(p))], dtype=torch.float64)
    p /= p.sum()
    nucleus, total = [], 0.0
    for i in sorted(kept, key=lambda i: -p[i]):
        if total < top_p:
            nucleus.append(i)
        total += float(p[i])
    p = torch.tensor([p[i] if i in nucleus and p[i] >= min_p * p.max() else 0 for i in range(len(p))])
    return p / p.sum()


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"top_k": 3},
    {"top_p": 0.7},
    {"min_p": 0.3},
    {"temperature": 1.7, "top_k": 5, "top_p": 0.8, "min_p": 0.2},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("beside", [[], [{}], [{"top_k": 2}], [{"top_p": 0.5}, {"temperature": 0.0}]])
def test_shares_of_evenly_spread_draws(options: dict[str, Any], beside: list[dict[str, Any]]) -> None:
    requests = [Request(**{"prompt": [1], "temperature": 1.0, **o}) for o in [options, *beside]]
    sampler, logits_NV = Sampler(requests, CPU), LOGITS.expand(len(requests), -1)
    steps = 2000
    chosen = [int(sampler.pick(logits_NV, [(n + 0.5) / steps] * len(requests))[0]) for n in range(steps)]
    shares = torch.bincount(torch.tensor(chosen), minlength=len(LOGITS)) / steps
    assert (shares - expected(**options)).abs().max() < 2 / steps
    assert chosen == sorted(chosen)  # in the order of the ids, whatever is drawn beside it


@pytest.mark.parametrize("draw", [0.0, 0.5, 1 - 2**-53])
def test_what_was_truncated_is_never_drawn(draw: float) -> None:
    for options in OPTIONS[2:]:
        sampler = Sampler([Request(**{"prompt": [1], "temperature": 1.0, **options})], CPU)
        assert expected(**options)[int(sampler.pick(LOGITS[None], [draw]))] > 0


def test_temperature_zero_takes_the_first_of_the_likeliest() -> None:
    tied = torch.tensor([[0.0, 2.0, 2.0], [0.0, 2.0, 2.0]])
    requests = [Request(prompt=[1]), Request(prompt=[1], temperature=1e-300)]
    assert Sampler(requests, CPU).pick(tied, [0.9, 0.1]).tolist() == [1, 1]


def test_the_penalty_makes_tokens_of_the_text_less_likely() -> None:
    requests = [Request(prompt=[1], repetition_penalty=2.0), Request(prompt=[1])]
    sampler = Sampler(requests, CPU)
    assert sampler.penalizes
    seen = torch.zeros(2, len(LOGITS), dtype=torch.bool)
    seen[:, 1] = True
    assert sampler.pick(LOGITS.expand(2, -1), [0, 0], seen).tolist() == [5, 1]
    negative = torch.tensor([[-1.0, -1.1]])
    assert Sampler(requests[:1], CPU).pick(negative, [0], torch.tensor([[True, False]])).tolist() == [1]
