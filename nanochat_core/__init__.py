"""nanochat's core. What plugins may import stands in ``__all__``; names that need torch are imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nanochat_core.documents import Documents, Problems, hold_out
from nanochat_core.errors import CheckpointError, ConfigError, DataError, NanochatError, PluginError, Problem
from nanochat_core.hookspecs import HOOK_API, hookimpl
from nanochat_core.options import above, at_least, between, one_of, option
from nanochat_core.paths import cache_dir
from nanochat_core.texts import SPECIAL_TOKENS, cut_long_runs, well_formed

if TYPE_CHECKING:
    from nanochat_core.casting import cast
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
        base_role,
        default_roles,
    )
    from nanochat_core.logger import Logger, LoggerContext, metrics_and_texts
    from nanochat_core.loss import cross_entropy
    from nanochat_core.reduction import GradientReducer, TorchOptimizer
    from nanochat_core.registry import Registrar
    from nanochat_core.sampling import generate
    from nanochat_core.scoring import (
        OutOfTime,
        SpanScore,
        greedy_match,
        is_close_call,
        pick_choice,
        score_choices,
        score_spans,
    )
    from nanochat_core.spans import Span, choice_spans, cropped_span, token_spans
    from nanochat_core.table_tokenizer import PerThread, TableTokenizer, load_table_tokenizer, special_tokens_from

_LAZY = {
    "cast": "casting",
    "World": "distributed",
    "Logger": "logger",
    "LoggerContext": "logger",
    "metrics_and_texts": "logger",
    "Registrar": "registry",
    "generate": "sampling",
    **dict.fromkeys(
        ["OutOfTime", "SpanScore", "greedy_match", "is_close_call", "pick_choice", "score_choices", "score_spans"],
        "scoring",
    ),
    **dict.fromkeys(["Span", "choice_spans", "cropped_span", "token_spans"], "spans"),
    "cross_entropy": "loss",
    **dict.fromkeys(["PerThread", "TableTokenizer", "load_table_tokenizer", "special_tokens_from"], "table_tokenizer"),
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
            "base_role",
            "default_roles",
        ],
        "interfaces",
    ),
}

__version__ = "0.1.0"
__all__ = [
    "HOOK_API",
    "IGNORED",
    "SPECIAL_TOKENS",
    "Batch",
    "Cache",
    "CheckpointError",
    "ConfigError",
    "DataContext",
    "DataError",
    "DataSource",
    "Documents",
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
    "OutOfTime",
    "PerThread",
    "PluginError",
    "Problem",
    "Problems",
    "Registrar",
    "Resolved",
    "Span",
    "SpanScore",
    "Split",
    "TableTokenizer",
    "Tokenizer",
    "TokenizerContext",
    "Tokens",
    "TorchOptimizer",
    "World",
    "above",
    "at_least",
    "base_role",
    "between",
    "cache_dir",
    "cast",
    "choice_spans",
    "cropped_span",
    "cross_entropy",
    "cut_long_runs",
    "default_roles",
    "generate",
    "greedy_match",
    "hold_out",
    "hookimpl",
    "is_close_call",
    "load_table_tokenizer",
    "metrics_and_texts",
    "one_of",
    "option",
    "pick_choice",
    "score_choices",
    "score_spans",
    "special_tokens_from",
    "token_spans",
    "well_formed",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'nanochat_core' has no attribute {name!r}")
    return getattr(importlib.import_module(f"nanochat_core.{_LAZY[name]}"), name)
