"""Registers the evaluator ``bpb``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanochat_bpb.config import BpbConfig
from nanochat_core import hookimpl

if TYPE_CHECKING:
    from nanochat_core import Registrar


@hookimpl
def nanochat_register_evaluators(registry: Registrar) -> None:
    registry.add(
        "bpb",
        config=BpbConfig,
        factory="nanochat_bpb.evaluator:BitsPerByte",
        summary="bits per byte: loss that does not depend on the tokenizer",
        defaults={"every": 250, "at_start": True, "at_end": True},
        aliases={"eval_every": "every"},
        best_metric="val/bpb",
    )
