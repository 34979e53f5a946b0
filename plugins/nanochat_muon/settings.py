"""Values of the options for one model: numbers for every "auto", and AdamW's settings for each role."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs

from nanochat_core import ConfigError, OptimizerContext, Resolved, base_role
from nanochat_muon.config import MuonAdamWConfig

REFERENCE_BATCH = 2**19  # tokens; the batch size for which learning rates and decays were tuned at depth 12


def resolve(config: MuonAdamWConfig, context: OptimizerContext) -> dict[str, Resolved]:
    """Values of the options that are "auto". (Except ``ns_dtype``, which depends on the machine.)

    Raises:
        ConfigError: when matrix_weight_decay_scale is "auto" and the model has no reference.
    """
    batch = math.sqrt(context.total_batch_size / REFERENCE_BATCH)

    def decay_scale() -> Resolved:
        if context.relative_data is None:
            problem = (
                'this model has no reference for "auto": set it to a number (1.0 leaves matrix_weight_decay unchanged)'
            )
            raise ConfigError(problem, key="matrix_weight_decay_scale")
        ratio = f"D / D12 = {context.relative_data:.3g}"
        formula = f"sqrt(total_batch_size / 2^19) x D12 / D, {ratio} by the data : parameter ratio"
        return Resolved(batch / context.relative_data, formula)

    def same(option: str) -> Callable[[], Resolved]:
        return lambda: Resolved(getattr(config, option), f"as {option}")

    formulas: dict[str, Callable[[], Resolved]] = {
        "value_embedding_lr": lambda: Resolved(config.embedding_lr / 2, "half of embedding_lr"),
        "residual_lr": lambda: Resolved(0.01 * config.scalar_lr, "0.01 x scalar_lr"),
        "lr_scale": lambda: Resolved(batch, "sqrt(total_batch_size / 2^19)"),
        "matrix_weight_decay_scale": decay_scale,
        "embedding_weight_decay": same("weight_decay"),
        "value_embedding_weight_decay": same("weight_decay"),
        "unembedding_weight_decay": same("weight_decay"),
        "embedding_beta2": same("adam_beta2"),
        "unembedding_beta2": same("adam_beta2"),
        "x0_beta1": same("adam_beta1"),
        "momentum_end": same("momentum"),
    }
    return {name: formula() for name, formula in formulas.items() if getattr(config, name) == "auto"}


def fill_in(config: MuonAdamWConfig, resolved: Mapping[str, Resolved]) -> MuonAdamWConfig:
    """The options with numbers in place of "auto"."""
    values: dict[str, Any] = {name: r.value for name, r in resolved.items()}
    return attrs.evolve(config, **values)


def number(value: float | str) -> float:
    assert not isinstance(value, str), "every auto is resolved"
    return value


@attrs.frozen
class AdamW:
    """AdamW's settings for the parameters of one role."""

    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float


def adamw_by_role(config: MuonAdamWConfig, hidden_size: int) -> dict[str, AdamW]:
    """AdamW's settings for each role but matrix.

    Args:
        config: with numbers in place of "auto".
        hidden_size: width of the model.
    """
    c, scale = config, number(config.lr_scale)
    wide = scale * (hidden_size / 768) ** -0.5
    first, second = c.adam_beta1, c.adam_beta2
    embedding_betas = (first, number(c.embedding_beta2))
    table: dict[str, tuple[float, float, tuple[float, float]]] = {
        "embedding": (c.embedding_lr * wide, number(c.embedding_weight_decay), embedding_betas),
        "embedding.value": (
            number(c.value_embedding_lr) * wide, number(c.value_embedding_weight_decay), embedding_betas
        ),
        "head": (c.unembedding_lr * wide, number(c.unembedding_weight_decay), (first, number(c.unembedding_beta2))),
        "scalar": (c.scalar_lr * scale, 0.0, (first, second)),
        "scalar.x0": (c.scalar_lr * scale, 0.0, (number(c.x0_beta1), second)),
        "scalar.residual": (number(c.residual_lr) * scale, c.residual_weight_decay, (first, second)),
        "scalar.smear": (c.smear_lr, 0.0, (first, second)),
    }  # fmt: skip
    return {role: AdamW(*row, eps=c.adam_eps) for role, row in table.items()}


def matrix_lr(config: MuonAdamWConfig) -> float:
    return config.matrix_lr * number(config.lr_scale)


def matrix_decay(config: MuonAdamWConfig) -> float:
    return config.matrix_weight_decay * number(config.matrix_weight_decay_scale)


def momentum(config: MuonAdamWConfig, step: int, warmdown: float) -> float:
    """Muon's momentum at a step.

    Over momentum_warmup_steps it rises linearly from momentum_start to momentum, which over the warmdown changes to
    momentum_end.

    Args:
        config: with numbers in place of "auto".
        step: number of updates so far.
        warmdown: part of the schedule's warmdown that is done, 0 to 1.
    """
    done = min(1.0, step / config.momentum_warmup_steps) if config.momentum_warmup_steps else 1.0
    target = (1 - warmdown) * config.momentum + warmdown * number(config.momentum_end)
    return (1 - done) * config.momentum_start + done * target


def decay_factor(schedule: str, step: int, num_iterations: int) -> float:
    """Factor on the matrices' weight decay: 1, or with "cosine" from 1 to 0 along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * step / num_iterations)) if schedule == "cosine" else 1.0


def describe(
    config: MuonAdamWConfig, roles: Iterable[str], methods: Mapping[str, AdamW], follows_data: bool
) -> dict[str, str | int]:
    """Rows of the banner: learning rates, and the matrices' weight decay unless it is 0.

    Args:
        config: with numbers in place of "auto".
        roles: roles of the model's parameters: keys of ``methods``, or ``matrix``.
        methods: AdamW's settings by role.
        follows_data: whether matrix_weight_decay_scale was "auto".
    """
    present = set(roles)
    rates = {"matrix": matrix_lr(config), **{role: method.lr for role, method in methods.items()}}
    rows: dict[str, str | int] = {
        "learning rates": ", ".join(f"{role} {lr:.3g}" for role, lr in rates.items() if role in present)
    }
    decay = matrix_decay(config)
    if decay and "matrix" in present:
        text = f"{decay:.3g}" + ", cautious" * config.cautious_weight_decay
        text += ", cosine to 0" * (config.matrix_weight_decay_schedule == "cosine")
        if decay > 1:
            text += f"; warning: above 1; times the learning rate, a step removes up to {decay * rates['matrix']:.1%}"
        if follows_data:
            text += (
                '; it and total_batch_size = "auto" follow the data : parameter ratio, even if num_iterations or '
                "target_flops sets the number of steps"
            )
        rows["matrix decay"] = text
    return rows


def known_role(role: str, methods: Mapping[str, AdamW]) -> str:
    """The role that determines the settings: the full role if it is known, otherwise the base role."""
    return role if role in methods else base_role(role)
