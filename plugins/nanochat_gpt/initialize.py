"""Initial weights of a GPT. Matrices whose output is added to the residual stream start at zero."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nanochat_gpt.config import GPTConfig

Draw = Callable[[Tensor], object]


@torch.no_grad()
def initialize(model: nn.Module, config: GPTConfig) -> None:
    """Initialize every parameter in the model's order, with torch's default generator."""
    kinds = _kinds(config)
    for name, parameter in model.named_parameters():
        kind = next(part for part in reversed(name.split(".")) if part in kinds)
        kinds[kind](parameter)


def _kinds(config: GPTConfig) -> dict[str, Draw]:
    """Initializers by the part of a parameter's name that identifies its kind."""
    modern = config.init == "modern"
    std = config.shape().width ** -0.5
    matrix = _uniform(std) if modern else _classic
    return {
        "embedding": _normal(0.8 if modern else 1.0),
        "head": _normal(0.001) if modern else nn.init.zeros_,
        "query": matrix,
        "key": matrix,
        "value": matrix,
        "output": nn.init.zeros_,
        "up": _uniform(0.4 * std) if modern else _classic,
        "down": nn.init.zeros_,
        "value_embeddings": _uniform(std),
        "value_gate": _small,
        "residual_scalars": _line(1.15, 1.05),
        "x0_scalars": _line(0.20, 0.05),
        "smear_gate": _small,
        "smear_factor": nn.init.zeros_,
        "backout_factor": lambda weight: nn.init.constant_(weight, 0.2),
    }


def _normal(std: float) -> Draw:
    return lambda weight: nn.init.normal_(weight, std=std)


def _uniform(std: float) -> Draw:
    bound = math.sqrt(3) * std
    return lambda weight: nn.init.uniform_(weight, -bound, bound)


def _classic(weight: Tensor) -> None:
    fan_out, fan_in = weight.shape
    nn.init.normal_(weight, std=min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in))


def _small(weight: Tensor) -> None:
    nn.init.uniform_(weight, 0, 0.02)


def _line(first: float, last: float) -> Draw:
    """Values that change linearly from the first layer to the last."""
    return lambda weight: weight.copy_(torch.linspace(first, last, len(weight)))
