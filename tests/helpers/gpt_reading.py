"""Small GPTs for tests, and a plain implementation of the model's recipe."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nanochat_core import ModelContext
from nanochat_gpt.config import GPTConfig
from nanochat_gpt.model import GPT, build

VOCAB, T = 50, 8
SMALL = GPTConfig(depth=2, aspect_ratio=16, head_dim=8)  # width 32, 4 heads


def make(config: GPTConfig = SMALL, dtype: torch.dtype = torch.float64, seed: int = 0) -> GPT:
    """A model with random values for all parameters. (Initialization leaves some at zero.)"""
    torch.manual_seed(seed)
    model = build(config, ModelContext(VOCAB, T, torch.device("cpu"), dtype))
    for name, parameter in model.named_parameters():
        if name != "embedding.weight":
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch(rows: int = 3, length: int = T, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, length + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:].clone()


def norm(x: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps)


def recipe_logits(model: GPT, ids: Tensor) -> Tensor:
    """Logits [B, T, V] by a plain implementation of the recipe, head by head, in the dtype of the weights."""
    config, shape = model.config, model.config.shape()
    eps, C, L = config.norm_eps, shape.head_dim, config.depth
    weights = dict(model.named_parameters())
    x = norm(weights["embedding.weight"][ids], eps)
    if config.smear:
        smeared = [x[:, 0]]
        for t in range(1, ids.shape[1]):
            gate = torch.sigmoid(x[:, t, :24] @ weights["smear_gate.weight"].T)
            smeared.append(x[:, t] + weights["smear_factor"] * gate * x[:, t - 1])
        x = torch.stack(smeared, 1)
    x0, middle = x, x
    positions = torch.arange(ids.shape[1], dtype=x.dtype)
    for layer in range(L):
        w = {n.removeprefix(f"blocks.{layer}."): p for n, p in weights.items() if n.startswith(f"blocks.{layer}.")}
        if config.residual_scalars:
            x = weights["residual_scalars"][layer] * x + weights["x0_scalars"][layer] * x0
        y = norm(x, eps)
        short = config.window_pattern[layer % len(config.window_pattern)] == "S" and layer < L - 1
        heads = []
        for h in range(shape.heads):
            g = h // (shape.heads // shape.kv_heads)  # the key and value head that this query head reads
            q = y @ w["attention.query.weight"][h * C : (h + 1) * C].T
            k = y @ w["attention.key.weight"][g * C : (g + 1) * C].T
            v = y @ w["attention.value.weight"][g * C : (g + 1) * C].T
            if config.value_embeddings and (L - 1 - layer) % 2 == 0:
                embedded = weights[f"value_embeddings.{layer}.weight"][ids][..., g * C : (g + 1) * C]
                v = v + 3 * torch.sigmoid(y[..., :12] @ w["attention.value_gate.weight"][g])[..., None] * embedded
            q, k = (config.qk_scale * norm(rotated(z, positions, config.rope_base), eps) for z in (q, k))
            scores = q @ k.mT / math.sqrt(C)
            distance = positions[:, None] - positions[None, :]
            hidden = (distance < 0) | (distance > config.window) if short else distance < 0
            heads.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ v)
        x = x + torch.cat(heads, -1) @ w["attention.output.weight"].T
        x = x + torch.relu(norm(x, eps) @ w["mlp.up.weight"].T) ** 2 @ w["mlp.down.weight"].T
        middle = x if layer == L // 2 else middle
    if config.backout:
        x = x - weights["backout_factor"] * middle
    z = norm(x, eps) @ weights["head.weight"][: model.vocab_size].T
    return config.softcap * torch.tanh(z / config.softcap) if config.softcap else z


def rotated(x: Tensor, positions: Tensor, base: float) -> Tensor:
    half = x.shape[-1] // 2
    out = torch.zeros_like(x)
    for c in range(half):
        angle = positions * base ** (-2 * c / x.shape[-1])
        out[..., c] = x[..., c] * angle.cos() + x[..., c + half] * angle.sin()
        out[..., c + half] = -x[..., c] * angle.sin() + x[..., c + half] * angle.cos()
    return out


CONFIGS = [
    SMALL,
    GPTConfig(depth=2, aspect_ratio=16, head_dim=8, n_kv_head=2),  # grouped queries
    GPTConfig(depth=1, aspect_ratio=16, head_dim=8, n_kv_head=1, softcap=0.0, rope_base=500.0, norm_eps=1e-2),
    GPTConfig(depth=1, aspect_ratio=20, head_dim=8, softcap=40.0),  # width rounded up
]
# Each option alone, then all of them.
OPTIONS: dict[str, dict[str, Any]] = {
    "qk_scale": {"qk_scale": 1.2},
    "window_pattern": {"window_pattern": "SL", "window": 2},
    "value_embeddings": {"value_embeddings": True},
    "residual_scalars": {"residual_scalars": True},
    "smear": {"smear": True},
    "backout": {"backout": True},
    "width_rounding": {"width_rounding": "head_dim", "head_dim": 12},
}
THREE = {"depth": 3, "aspect_ratio": 11, "head_dim": 9}  # width 40: four heads of 10
ALL = GPTConfig(
    **{"depth": 5, "aspect_ratio": 8, "head_dim": 12, "n_kv_head": 2}
    | {k: v for o in OPTIONS.values() for k, v in o.items()}
)
CONFIGS += [GPTConfig(**THREE | option) for option in OPTIONS.values()] + [ALL]
