"""Registers the evaluator ``samples``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanochat_core import hookimpl
from nanochat_samples.config import SamplesConfig

if TYPE_CHECKING:
    from nanochat_core import Registrar


@hookimpl
def nanochat_register_evaluators(registry: Registrar) -> None:
    registry.add(
        "samples",
        config=SamplesConfig,
        factory="nanochat_samples.evaluator:Samples",
        summary="how the model continues a few prompts",
        defaults={"every": 2000, "at_start": False, "at_end": True},
        aliases={"sample_every": "every"},
    )
