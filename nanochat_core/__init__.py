"""nanochat's core. What plugins may import stands in ``__all__``; names that need torch are imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nanochat_core.errors import CheckpointError, ConfigError, DataError, NanochatError, PluginError, Problem
from nanochat_core.hookspecs import HOOK_API, hookimpl
from nanochat_core.options import above, at_least, between, one_of, option

if TYPE_CHECKING:
    from nanochat_core.distributed import World
    from nanochat_core.interfaces import (
        IGNORED,
        Batch,
        Cache,
        DataContext,
        DataSource,
        Evaluation,
        Evaluator,
        EvaluatorContext,
        Logger,
        LoggerContext,
        Model,
        ModelContext,
        Multipliers,
        Optimizer,
        OptimizerContext,
        Resolved,
        Split,
        Tokenizer,
        TokenizerContext,
        Tokens,
        default_roles,
    )
    from nanochat_core.loss import cross_entropy
    from nanochat_core.reduction import GradientReducer, TorchOptimizer
    from nanochat_core.registry import Registrar
    from nanochat_core.sampling import generate

_LAZY = {
    "World": "distributed",
    "Registrar": "registry",
    "generate": "sampling",
    "cross_entropy": "loss",
    "GradientReducer": "reduction",
    "TorchOptimizer": "reduction",
    **dict.fromkeys(
        [
            "IGNORED",
            "Batch",
            "Cache",
            "DataContext",
            "DataSource",
            "Evaluation",
            "Evaluator",
            "EvaluatorContext",
            "Logger",
            "LoggerContext",
            "Model",
            "ModelContext",
            "Multipliers",
            "Optimizer",
            "OptimizerContext",
            "Resolved",
            "Split",
            "Tokenizer",
            "TokenizerContext",
            "Tokens",
            "default_roles",
        ],
        "interfaces",
    ),
}

__version__ = "0.1.0"
__all__ = [
    "HOOK_API",
    "IGNORED",
    "Batch",
    "Cache",
    "CheckpointError",
    "ConfigError",
    "DataContext",
    "DataError",
    "DataSource",
    "Evaluation",
    "Evaluator",
    "EvaluatorContext",
    "GradientReducer",
    "Logger",
    "LoggerContext",
    "Model",
    "ModelContext",
    "Multipliers",
    "NanochatError",
    "Optimizer",
    "OptimizerContext",
    "PluginError",
    "Problem",
    "Registrar",
    "Resolved",
    "Split",
    "Tokenizer",
    "TokenizerContext",
    "Tokens",
    "TorchOptimizer",
    "World",
    "above",
    "at_least",
    "between",
    "cross_entropy",
    "default_roles",
    "generate",
    "hookimpl",
    "one_of",
    "option",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'nanochat_core' has no attribute {name!r}")
    return getattr(importlib.import_module(f"nanochat_core.{_LAZY[name]}"), name)
