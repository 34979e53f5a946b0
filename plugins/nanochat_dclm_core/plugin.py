"""Registers the evaluator ``core``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanochat_core import hookimpl
from nanochat_dclm_core.config import CoreConfig

if TYPE_CHECKING:
    from nanochat_core import Registrar


@hookimpl
def nanochat_register_evaluators(registry: Registrar) -> None:
    registry.add(
        "core",
        config=CoreConfig,
        factory="nanochat_dclm_core.evaluator:Core",
        summary="DCLM's CORE metric: 22 tasks of in-context learning",
        requires=["yaml"],
        install="pip install pyyaml",
        defaults={"every": 2000, "at_start": False, "at_end": True},
        aliases={"core_metric_every": "every", "core_metric_max_per_task": "max_per_task"},
    )
