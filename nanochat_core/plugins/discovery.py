"""Discovery of plugins through entry points. A broken plugin is reported in one line and does not stop the run."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import time
import traceback
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import attrs
import pluggy

from nanochat_core import __version__
from nanochat_core.errors import NanochatError, PluginError, did_you_mean
from nanochat_core.plugins import hookspecs
from nanochat_core.plugins.calls import importing, is_not_a_plugins, message_of
from nanochat_core.plugins.choice import RESERVED, EntryKeys
from nanochat_core.plugins.distribution import GROUP, check_core_version, identify
from nanochat_core.plugins.registry import KINDS, Command, CommandRegistrar, Entry, Kind, Registrar, Registry
from nanochat_core.plugins.structure import check_config_class, fields_of

_HOOKS: Mapping[Kind, str] = {kind: f"nanochat_register_{kind}s" for kind in KINDS}


@attrs.frozen
class PluginFailure:
    """A plugin that failed to load: its entry-point name, distribution, one line why, and the traceback."""

    plugin: str
    distribution: str
    reason: str
    traceback: str

    def __str__(self) -> str:
        return f"plugin {self.plugin!r} of {self.distribution} failed to load and is left out: {self.reason}"


@attrs.frozen
class LoadedPlugin:
    """A plugin that loaded: its entry-point name, distribution and version, and the seconds its import took."""

    plugin: str
    distribution: str
    version: str
    seconds: float


@attrs.frozen
class ObserverPlugin:
    """A plugin that implements hooks of a run's lifecycle."""

    plugin: str
    distribution: str
    module: Any


@attrs.define
class Plugins:
    """All registries, and the plugins that were loaded or failed to load."""

    registries: dict[Kind, Registry] = attrs.field(factory=lambda: {kind: Registry(kind) for kind in KINDS})
    loaded: list[LoadedPlugin] = attrs.field(factory=list)
    failures: list[PluginFailure] = attrs.field(factory=list)
    commands: list[Command] = attrs.field(factory=list)
    observers: list[ObserverPlugin] = attrs.field(factory=list)

    def __getitem__(self, kind: Kind) -> Registry:
        return self.registries[kind]

    def versions(self) -> dict[str, str]:
        """Return the version of each distribution that provides a plugin, by name."""
        return {p.distribution: p.version for p in self.loaded}

    def explain_failure(self, name: str) -> str:
        """Explain why ``name`` may be missing: all failed plugins, with the tracebacks of those whose name matches."""
        if not self.failures:
            return ""
        culprits = [f for f in self.failures if name in (f.plugin, f.distribution) or name in f.plugin]
        text = "".join(f"\n  {failure}" for failure in self.failures)
        return text + "".join(f"\n{culprit.traceback}" for culprit in culprits)


def load_plugins(only: str | None = None) -> Plugins:
    """Load every plugin of the entry-point group ``nanochat``, one by one.

    Args:
        only: comma-separated entry-point names to load, instead of the environment's ``NANOCHAT_PLUGINS``.
    """
    names = os.environ.get("NANOCHAT_PLUGINS", "") if only is None else only
    selected = [name.strip() for name in names.split(",") if name.strip()]
    plugins = Plugins()
    manager = pluggy.PluginManager("nanochat")
    manager.add_hookspecs(hookspecs)
    # The same entry may be listed twice when nanochat runs in a clone.
    points = {(e.name, e.value): e for e in importlib.metadata.entry_points(group=GROUP)}
    for point in sorted(points.values(), key=lambda e: (e.name, e.value)):
        if selected and point.name not in selected:
            continue
        distribution, version = identify(point.dist)
        start = time.perf_counter()
        try:
            if point.dist is not None:
                check_core_version(point.dist)
            with importing(f"plugin {point.name!r} of {distribution}"):
                module = point.load()
                _register(manager, plugins, module, point.name, distribution, version)
        except BaseException as error:  # a plugin may call sys.exit
            if not isinstance(error, NanochatError) and is_not_a_plugins(error):
                raise
            for registry in plugins.registries.values():
                registry.discard(point.name, distribution)
            plugins.commands = [c for c in plugins.commands if (c.plugin, c.distribution) != (point.name, distribution)]
            reason = f"{type(error).__name__}: {message_of(error)}".removesuffix(": ")
            plugins.failures.append(PluginFailure(point.name, distribution, reason, _traceback(error)))
        else:
            plugins.loaded.append(LoadedPlugin(point.name, distribution, version, time.perf_counter() - start))
    for name in selected:
        if name not in {p.plugin for p in plugins.loaded} | {f.plugin for f in plugins.failures}:
            plugins.failures.append(
                PluginFailure(name, "no distribution", "NANOCHAT_PLUGINS names it, but no package has it", "")
            )
    return plugins


def _traceback(error: BaseException) -> str:
    with contextlib.suppress(Exception):  # an exception whose text can't be made
        return "".join(traceback.format_exception(error))
    return "".join(traceback.format_tb(error.__traceback__))


def _register(
    manager: pluggy.PluginManager, plugins: Plugins, module: Any, name: str, distribution: str, version: str
) -> None:
    """Validate a plugin's hooks and call them. An invalid plugin raises an exception."""
    api = getattr(module, "NANOCHAT_HOOK_API", hookspecs.HOOK_API)
    if api != hookspecs.HOOK_API:
        raise PluginError(
            f"it is written for hook API {api}, nanochat {__version__} has {hookspecs.HOOK_API}: install a version "
            f"of {distribution} for hook API {hookspecs.HOOK_API}, or "
            f"{'a newer' if api > hookspecs.HOOK_API else 'an older'} nanochat with hook API {api}"
        )
    known = set(hookspecs.HOOKS)
    implemented = [n for n in dir(module) if getattr(getattr(module, n, None), "nanochat_impl", None) is not None]
    for hook in implemented:
        if hook not in known:
            raise pluggy.PluginValidationError(module, f"unknown hook {hook!r}{did_you_mean(hook, known)}")
    unmarked = sorted(known & set(dir(module)) - set(implemented))
    if unmarked:
        raise pluggy.PluginValidationError(module, f"hook {unmarked[0]!r} is not marked with @hookimpl")
    if not implemented:
        what = f"module {module.__name__}" if isinstance(module, ModuleType) else repr(module)
        raise pluggy.PluginValidationError(module, f"{what} implements no nanochat hook: mark it with @hookimpl")
    manager.register(module, f"{name} of {distribution}")  # checks signatures
    for kind, hook in _HOOKS.items():
        if hook in implemented:
            caller = manager.subset_hook_caller(hook, [p for p in manager.get_plugins() if p is not module])
            caller(registry=Registrar(plugins[kind], name, distribution, version))
            for entry in plugins[kind].entries:
                if (entry.plugin, entry.distribution) == (name, distribution):
                    check_config_class(kind, entry.name, entry.config)
                    _check_keys(entry)
    if hookspecs.nanochat_register_commands.__name__ in implemented:
        module.nanochat_register_commands(CommandRegistrar(plugins.commands, name, distribution))
    if set(hookspecs.OBSERVER_HOOKS) & set(implemented):
        plugins.observers.append(ObserverPlugin(name, distribution, module))


def _check_keys(entry: Entry) -> None:
    """Refuse defaults of keys that the core does not reserve, and aliases of options that do not exist."""
    own, reserved = set(fields_of(entry.config)), set(fields_of(RESERVED.get(entry.kind, EntryKeys)))
    for key in sorted(set(entry.defaults) - (reserved - {"plugin", "name"})):
        raise PluginError(f"{entry.kind} {entry.name!r}: defaults names {key!r}, which is not a key of the core")
    if entry.limit_option and entry.limit_option not in own:
        raise PluginError(f"{entry.kind} {entry.name!r}: limit_option {entry.limit_option!r} is not one of its options")
    for old, new in entry.aliases.items():
        if new not in own | reserved or old in own | reserved:
            raise PluginError(f"{entry.kind} {entry.name!r}: alias {old!r} must be a new name, and {new!r} an option")
