"""Registers the model ``gpt``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanochat_core import hookimpl
from nanochat_gpt.config import GPTConfig

if TYPE_CHECKING:
    from nanochat_core import Registrar


@hookimpl
def nanochat_register_models(registry: Registrar) -> None:
    registry.add(
        "gpt",
        config=GPTConfig,
        factory="nanochat_gpt.model:build",
        summary="GPT with rotary positions, QK norm, relu-squared MLP and untied head; size set by depth",
    )
