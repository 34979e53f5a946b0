"""Registers the evaluator ``lm_eval``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanochat_core import hookimpl
from nanochat_lm_eval.config import LMEvalConfig

if TYPE_CHECKING:
    from nanochat_core import Registrar


@hookimpl
def nanochat_register_evaluators(registry: Registrar) -> None:
    registry.add(
        "lm_eval",
        config=LMEvalConfig,
        factory="nanochat_lm_eval.evaluator:LMEval",
        summary="tasks of EleutherAI's lm-evaluation-harness",
        requires=["lm_eval"],
        install="pip install 'nanochat-core[lm-eval]'",
        defaults={"every": 0, "at_start": False, "at_end": True},
    )
