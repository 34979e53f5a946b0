"""AdamW of torch, with one parameter group per learning rate and decay."""

from __future__ import annotations

from typing import Any

import torch

from nanochat_adamw.config import AdamWConfig
from nanochat_core import OptimizerContext, TorchOptimizer, base_role


def build(config: AdamWConfig, context: OptimizerContext) -> TorchOptimizer:
    """Build AdamW with learning rates and decays by base role.

    A parameter of an unknown role decays like a matrix when it has two dimensions or more.
    """
    lrs = {"embedding": config.embedding_lr, "head": config.unembedding_lr}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in context.parameters.items():
        role = base_role(context.roles[name])
        lr = lrs.get(role, "auto")
        lr = config.lr if lr == "auto" else lr
        decay = config.weight_decay if parameter.ndim >= 2 and role not in ("embedding", "scalar") else 0.0
        group = groups.setdefault((lr, decay), {"params": [], "lr": lr, "weight_decay": decay})
        group["params"].append(parameter)
    fused = context.world.device.type in ("cpu", "cuda", "mps")  # one pass over memory instead of ten
    optimizer = torch.optim.AdamW(
        list(groups.values()), lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused
    )
    return TorchOptimizer(optimizer, context.parameters, context.world)
