"""The hooks a plugin may implement: one per kind, one for commands, and those that observe a run.

HOOK_API increases when a hook changes incompatibly. A plugin module may set ``NANOCHAT_HOOK_API`` to the version that
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
    """Register tokenizers: ``registry.add(name, config=..., factory="module:attribute", summary=...)``."""


@hookspec
def nanochat_register_data_sources(registry: Registrar) -> None:
    """Register data sources with ``registry.add``."""


@hookspec
def nanochat_register_models(registry: Registrar) -> None:
    """Register models with ``registry.add``."""


@hookspec
def nanochat_register_optimizers(registry: Registrar) -> None:
    """Register optimizers with ``registry.add``."""


@hookspec
def nanochat_register_evaluators(registry: Registrar) -> None:
    """Register evaluators with ``registry.add``."""


@hookspec
def nanochat_register_loggers(registry: Registrar) -> None:
    """Register loggers with ``registry.add``."""


@hookspec
def nanochat_register_commands(cli: CommandRegistrar) -> None:
    """Register commands: ``cli.add(name, module="my_plugin.command", summary=...)``."""


# Observers: called in a separate process of the plugin, in order, soon after the event. An exception is reported once.


@hookspec
def nanochat_run_started(context: LoggerContext) -> None:
    """Called when training starts or is resumed; the context describes the run."""


@hookspec
def nanochat_step_finished(context: LoggerContext, step: int, metrics: Mapping[str, float]) -> None:
    """Called after an optimizer step; ``step`` counts from 0."""


@hookspec
def nanochat_evaluation_finished(
    context: LoggerContext, step: int, evaluator: str, metrics: Mapping[str, float], texts: Mapping[str, str]
) -> None:
    """Called after an evaluation of the model after ``step`` steps; ``evaluator`` is the name of its entry."""


@hookspec
def nanochat_checkpoint_saved(context: LoggerContext, step: int, path: Path) -> None:
    """Called after a checkpoint was saved at ``path``."""


@hookspec
def nanochat_run_ended(context: LoggerContext, status: str) -> None:
    """Called when the run ends; the status is "finished", "failed" (also when it was killed), or "preempted"."""


HOOKS = tuple(name for name, value in list(globals().items()) if hasattr(value, f"{hookspec.project_name}_spec"))
OBSERVER_HOOKS = tuple(name for name in HOOKS if not name.startswith("nanochat_register_"))
