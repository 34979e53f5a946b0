"""The hooks a plugin may implement: one a kind, one for commands, and those that observe a run.

HOOK_API grows when a hook changes incompatibly. A plugin module may say ``NANOCHAT_HOOK_API = 1``, the one
it was written for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from nanochat_core.interfaces.logger import LoggerContext
    from nanochat_core.plugins.registry import CommandRegistrar, Registrar

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


@hookspec
def nanochat_register_commands(cli: CommandRegistrar) -> None:
    """Add commands: ``cli.add(name, module="my_plugin.command", summary=...)``."""


# Observers. Called in a process of the plugin's own, soon after the event, in order; what they raise is reported once.


@hookspec
def nanochat_run_started(context: LoggerContext) -> None:
    """Training starts or goes on; the context says what the run is."""


@hookspec
def nanochat_step_finished(context: LoggerContext, step: int, metrics: Mapping[str, float]) -> None:
    """An optimizer step is done; ``step`` counts from 0."""


@hookspec
def nanochat_evaluation_finished(
    context: LoggerContext, step: int, evaluator: str, metrics: Mapping[str, float], texts: Mapping[str, str]
) -> None:
    """An evaluator has looked at the model after ``step`` steps; ``evaluator`` is its entry's name."""


@hookspec
def nanochat_checkpoint_saved(context: LoggerContext, step: int, path: Path) -> None:
    """A checkpoint was saved."""


@hookspec
def nanochat_run_ended(context: LoggerContext, status: str) -> None:
    """The run is finished, failed (or was killed), or preempted."""


HOOKS = tuple(name for name, value in list(globals().items()) if hasattr(value, f"{hookspec.project_name}_spec"))
OBSERVER_HOOKS = tuple(name for name in HOOKS if not name.startswith("nanochat_register_"))
