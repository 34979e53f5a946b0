"""nanochat's core. What plugins may import stands in ``__all__``; names that need torch are imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nanochat_core.errors import CheckpointError, ConfigError, DataError, NanochatError, PluginError
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
    from nanochat_core.registry import Registrar

_LAZY = {
    "World": "distributed",
    "Registrar": "registry",
    "generate": "generate",
    "cross_entropy": "loss",
    "GradientReducer": "reduction",
    "TorchOptimizer": "reduction",
    **dict.fromkeys(
        (
            "IGNORED Batch Cache DataContext DataSource Evaluation Evaluator EvaluatorContext Logger LoggerContext "
            "Model ModelContext Multipliers Optimizer OptimizerContext Resolved Split Tokenizer TokenizerContext Tokens "
            "default_roles"
        ).split(),
        "interfaces",
    ),
}

__version__ = "0.1.0"
__all__ = [  # noqa: PLE0604 - lazy names are resolved by __getattr__
    "HOOK_API",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "NanochatError",
    "PluginError",
    "above",
    "at_least",
    "between",
    "hookimpl",
    "one_of",
    "option",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'nanochat_core' has no attribute {name!r}")
    return getattr(importlib.import_module(f"nanochat_core.{_LAZY[name]}"), name)
