"""Observers: plugins whose hooks are called during a run. Each is isolated like a logger, in a process of its own that
follows the ledger, so that one that raises, hangs or dies never touches training. Imports no torch."""

from __future__ import annotations

import inspect
import json
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs

from nanochat_core.errors import PluginError
from nanochat_core.files import JSON_LIMIT, read_regular, write_atomic
from nanochat_core.interfaces.logger import Logger, LoggerContext, metrics_and_texts
from nanochat_core.plugins import hookspecs
from nanochat_core.plugins.choice import Choice, LoggerKeys
from nanochat_core.plugins.discovery import load_plugins
from nanochat_core.plugins.registry import Entry
from nanochat_core.runs.directory import RunDirectory, list_checkpoints, step_of

PREFIX = "observer-"


@attrs.frozen
class ObserverConfig:
    """Entry-point name and distribution of the plugin."""

    plugin: str
    distribution: str


class Observer(Logger):
    """A logger that calls the lifecycle hooks of one plugin."""

    def __init__(self, config: ObserverConfig, context: LoggerContext) -> None:
        wanted = (config.plugin, config.distribution)
        found = [o for o in load_plugins().observers if (o.plugin, o.distribution) == wanted]
        if not found:
            raise PluginError(f"plugin {config.plugin!r} of {config.distribution} does not load any more")
        self.module, self.context, self.failures = found[0].module, context, 0
        self.memory = RunDirectory(context.directory).loggers / f"{PREFIX}{config.plugin}.checkpoints.json"
        self.checkpoints = _names_in(self.memory)
        self._call(hookspecs.nanochat_run_started)

    def log(self, record: Mapping[str, float | str]) -> None:
        step = int(record["step"])
        self._tell_checkpoints(step)  # those of later steps, which exist already, follow later
        metrics, texts = metrics_and_texts(record)
        if "evaluator" in record:
            evaluator = record["evaluator"]
            self._call(
                hookspecs.nanochat_evaluation_finished, step=step, evaluator=evaluator, metrics=metrics, texts=texts
            )
        else:
            self._call(hookspecs.nanochat_step_finished, step=step, metrics=metrics)

    def finish(self, status: Literal["finished", "failed", "preempted"]) -> None:
        self._tell_checkpoints()
        self._call(hookspecs.nanochat_run_ended, status=status)
        if self.failures > 1:
            self.context.report(f"its hooks failed {self.failures} times in all")

    def _tell_checkpoints(self, until: float = math.inf) -> None:
        for path in reversed(list_checkpoints(RunDirectory(self.context.directory).checkpoints)):
            step = step_of(path)
            if path.name not in self.checkpoints and step <= until:
                self.checkpoints.append(path.name)
                write_atomic(self.memory, json.dumps(self.checkpoints) + "\n")
                self._call(hookspecs.nanochat_checkpoint_saved, step=step, path=path)

    def _call(self, hook: Callable[..., None], **arguments: Any) -> None:
        """Call the plugin's function for the hook with those of the arguments that it takes, as pluggy does."""
        function = getattr(self.module, hook.__name__, None)
        if function is not None:
            known = {"context": self.context, **arguments}
            try:
                function(**{name: known[name] for name in inspect.signature(function).parameters})
            except Exception as error:
                traceback.print_exc()
                self.failures += 1
                if self.failures == 1:
                    self.context.report(f"{hook.__name__} failed, training continues: {type(error).__name__}: {error}")


def _names_in(memory: Path) -> list[str]:
    """Return the names in a file of ``Observer.memory``; none when it isn't there, or isn't one."""
    try:
        names = json.loads(read_regular(memory, JSON_LIMIT).decode())
    except (OSError, ValueError, RecursionError):
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def observer_choices(observers: Sequence[tuple[str, str]]) -> tuple[Choice, ...]:
    """Return choices of loggers that call the hooks of observers, given as plugin name and distribution."""
    choices = []
    for plugin, distribution in observers:
        name = PREFIX + plugin.replace(".", "-")
        entry = Entry(
            "logger", name, ObserverConfig, "nanochat_core.loggers.observers:Observer", "", distribution=distribution
        )
        choices.append(Choice(LoggerKeys(name, name), entry, ObserverConfig(plugin, distribution)))
    return tuple(choices)
