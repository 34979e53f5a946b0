"""Options that several tests train with."""

from __future__ import annotations

from typing import Any

# All features of muon_adamw, with values of experiments/speedrun.toml.
MODERN_MUON: dict[str, Any] = {
    "polar_express": True,
    "row_equilibration": True,
    "renormalize": True,
    "variance_reduction": True,
    "cautious_weight_decay": True,
    "matrix_weight_decay": 0.28,
    "matrix_weight_decay_schedule": "cosine",
    "momentum": 0.97,
    "momentum_warmup_steps": 3,
    "momentum_end": 0.9,
    "embedding_lr": 0.3,
    "unembedding_lr": 0.008,
    "embedding_beta2": 0.995,
    "unembedding_beta2": 0.96,
    "x0_beta1": 0.96,
    "embedding_weight_decay": 0.001,
    "value_embedding_weight_decay": 0.01,
    "unembedding_weight_decay": 0.01,
    "residual_weight_decay": 0.05,
}
