"""The hooks a plugin may implement: one a kind. HOOK_API grows when a hook changes incompatibly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from nanochat_core.registry import Registrar

HOOK_API = 1

hookspec = pluggy.HookspecMarker("nanochat")
hookimpl = pluggy.HookimplMarker("nanochat")


@hookspec
def nanochat_register_tokenizers(registry: Registrar) -> None:
    """Add tokenizers: ``registry.add(name, config=..., factory="module:attribute", summary=...)``."""


@hookspec
def nanochat_register_data_sources(registry: Registrar) -> None:
    """Add data sources."""


@hookspec
def nanochat_register_models(registry: Registrar) -> None:
    """Add models."""


@hookspec
def nanochat_register_optimizers(registry: Registrar) -> None:
    """Add optimizers."""


@hookspec
def nanochat_register_evaluators(registry: Registrar) -> None:
    """Add evaluators."""


@hookspec
def nanochat_register_loggers(registry: Registrar) -> None:
    """Add loggers."""
