"""Typed registries: what plugins offer, by kind and name.

A plugin's module adds its entries when ``load_plugins`` calls its hook, through a ``Registrar``::

    from nanochat_core import hookimpl
    from my_package.config import MyConfig  # an attrs class: its fields are the options

    @hookimpl
    def nanochat_register_tokenizers(registry):
        registry.add("mine", config=MyConfig, factory="my_package.tokenizer:build", summary="one line about it")

From then on ``plugin = "mine"`` in ``[tokenizer]`` of an experiment picks the entry, and the core builds it::

    entry = plugins["tokenizer"].get("mine")
    tokenizer = entry.load()(MyConfig(), context)  # imports my_package.tokenizer
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import attrs

from nanochat_core.errors import PluginError, did_you_mean
from nanochat_core.files import name_problem, shorten
from nanochat_core.plugins.calls import importing, plugin_call
from nanochat_core.plugins.surroundings import SETTINGS

Kind = Literal["tokenizer", "data_source", "model", "optimizer", "evaluator", "logger"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@attrs.frozen
class ModelVersion:
    """The version of a model's checkpoints, and the upgrade from older versions.

    Args:
        number: increases when options or parameters of older checkpoints change their meaning.
        upgrade: ``module:function``, imported for a checkpoint of an older version; called with (version, options,
            tensors), the options as plain data and the tensors by name, it returns both in the current version.
    """

    number: int = 1
    upgrade: str = ""


@attrs.frozen
class Entry:
    """A tokenizer, data source, model, optimizer, evaluator or logger that a plugin offers.

    Args:
        kind: kind of the entry.
        name: its name in TOML files.
        config: attrs class of its options.
        factory: ``module:attribute``, imported when an experiment picks it; called with (config, context).
        summary: one line for ``nanochat plugins``.
        requires: top-level modules that must be importable.
        install: command that installs them; by default pip with their names.
        defaults: values of the options that the core reserves on entries of this kind, such as ``every``.
        aliases: other names of options, accepted in TOML files: old to new.
        in_process: of a logger: whether it must run in the training process, as one that writes to the terminal;
            other loggers have a process of their own.
        check: of a logger: ``module:function``, called with (config, labels) before anything is built, the labels being
            a ``RunLabels``; it yields (option, message) for what the backend would refuse, such as ("run.tags", "...").
        model_version: of a model; of other kinds it has no meaning.
        default: of a data source: whether ``nanochat eval`` uses it for a model that comes without data.
        limit_option: of a data source: the option that limits the amount of data, which ``nanochat data -n`` sets.
        from_name: of a tokenizer: ``module:function``, called with the name of a well-known tokenizer, such as gpt2; it
            returns a config, or None when it doesn't know the name.
        best_metric: of an evaluator: the metric that ``[checkpoint] best_metric`` defaults to.
        plugin: entry-point name of the plugin; ``distribution`` and ``version``: the package it came in.
    """

    kind: Kind
    name: str
    config: type
    factory: str
    summary: str
    requires: tuple[str, ...] = ()
    install: str = ""
    defaults: Mapping[str, Any] = attrs.field(factory=dict)
    aliases: Mapping[str, str] = attrs.field(factory=dict)
    in_process: bool = False
    check: str = ""
    model_version: ModelVersion = ModelVersion()
    default: bool = False
    limit_option: str = ""
    from_name: str = ""
    best_metric: str = ""
    plugin: str = ""
    distribution: str = ""
    version: str = ""

    def missing(self) -> list[str]:
        """Required modules that are not installed."""
        return [m for m in self.requires if not _importable(m)]

    def how_to_install(self) -> str:
        """Return the command that installs the missing modules."""
        return self.install or f"pip install {' '.join(self.missing())}"

    def load(self) -> Callable[[Any, Any], Any]:
        """Import and return the factory.

        Raises:
            PluginError: when it can't be imported.
        """
        return self._import(self.factory)

    def load_upgrade(self) -> Callable[[int, dict[str, Any], dict[str, Any]], Any]:
        """Import and return the function that upgrades older checkpoints.

        Raises:
            PluginError: when it can't be imported.
        """
        return self._import(self.model_version.upgrade)

    def load_from_name(self) -> Callable[[str], Any]:
        """Import and return the function that returns configs of well-known tokenizers by name.

        Raises:
            PluginError: when it can't be imported.
        """
        return self._import(self.from_name)

    def load_check(self) -> Callable[[Any, Any], Iterable[tuple[str, str]]]:
        """Import and return the function that yields what a logger's backend would refuse.

        Raises:
            PluginError: when it can't be imported.
        """
        return self._import(self.check)

    def _import(self, target: str) -> Callable[..., Any]:
        module, _, attribute = target.partition(":")
        kind = self.kind.replace("_", " ")
        what = f"{kind} {self.name!r} of {self.distribution}"
        # A plugin that an experiment picks may prepare the environment for its library.
        with plugin_call(f"{what} {self.version} can't be imported ({target})"), importing(what, SETTINGS):
            found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
        return found


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a parent package is missing or broken
        return False


@attrs.define
class Registry:
    """Entries of one kind. A name that two plugins claim belongs to neither."""

    kind: Kind
    entries: list[Entry] = attrs.field(factory=list)

    def add(self, entry: Entry) -> None:
        self.entries.append(entry)

    def discard(self, plugin: str, distribution: str) -> None:
        """Remove the entries that a plugin added before it failed."""
        self.entries = [e for e in self.entries if (e.plugin, e.distribution) != (plugin, distribution)]

    def claims(self, name: str) -> list[Entry]:
        """All entries of that name: one, unless it is unknown or plugins clash."""
        return [e for e in self.entries if e.name == name]

    def clashes(self) -> list[str]:
        """Names that several plugins claim."""
        return sorted({e.name for e in self.entries if len(self.claims(e.name)) > 1})

    def get(self, name: str) -> Entry | None:
        claims = self.claims(name)
        return claims[0] if len(claims) == 1 else None

    def default(self) -> Entry | None:
        """The entry to use when none is named; None unless exactly one entry is a default."""
        found = [e for e in self.entries if e.default]
        return found[0] if len(found) == 1 else None

    def __iter__(self) -> Iterator[Entry]:
        return iter(sorted(self.entries, key=lambda e: e.name))

    def explain_clash(self, name: str) -> str:
        """Return the error message for a name that several distributions claim."""
        owners = " and ".join(f"{e.distribution} {e.version} (plugin {e.plugin!r})" for e in self.claims(name))
        return (
            f"{self.kind} {name!r} is claimed by {owners}: uninstall one, "
            f"or name the plugins to load in NANOCHAT_PLUGINS, separated by commas"
        )

    def suggest(self, name: str) -> str:
        """Return " (did you mean ...?)" or the list of installed names, to append to an error message."""
        return (
            did_you_mean(name, [e.name for e in self]) or f" (installed: {', '.join(e.name for e in self) or 'none'})"
        )


def _check_name(kind: str, name: object) -> None:
    """Refuse names of entries that can't become parts of keys and files."""
    problem = name_problem(name)
    if not problem and "." in str(name):
        problem = "must have no dots, because it becomes part of keys"
    if problem:
        raise PluginError(f"the name of a {kind}, {shorten(name)}, {problem}")


def _check_text(what: str, text: object) -> None:
    if not isinstance(text, str) or not text.isprintable() or len(text) > 500:
        raise PluginError(f"{what} must be one line of text, not {shorten(text)}")


@attrs.frozen
class Registrar:
    """A plugin's view of one registry, which adds entries in the plugin's name."""

    _registry: Registry
    plugin: str
    distribution: str
    version: str

    def add(
        self,
        name: str,
        *,
        config: type,
        factory: str,
        summary: str = "",
        requires: Iterable[str] = (),
        install: str = "",
        defaults: Mapping[str, Any] | None = None,
        aliases: Mapping[str, str] | None = None,
        in_process: bool = False,
        check: str = "",
        version: int = 1,
        upgrade: str = "",
        default: bool = False,
        limit_option: str = "",
        from_name: str = "",
        best_metric: str = "",
    ) -> None:
        """Register an entry. Arguments are those of ``Entry``; ``version`` and ``upgrade`` are of its ``ModelVersion``.

        Raises:
            PluginError: when an argument is malformed, or does not apply to this kind.
        """
        kind = self._registry.kind
        _check_name(kind.replace("_", " "), name)
        _check_text(f"summary of {name!r}", summary)
        _check_targets(name, {"factory": factory, "upgrade": upgrade, "from_name": from_name, "check": check})
        _check_types(name, requires, {
            "install": (install, str), "limit_option": (limit_option, str), "best_metric": (best_metric, str),
            "in_process": (in_process, bool), "default": (default, bool), "version": (version, int),
            "defaults": (defaults or {}, Mapping), "aliases": (aliases or {}, Mapping),
        })  # fmt: skip
        _check_kind(kind, name, {
            "model": ("a version and an upgrade", version != 1 or upgrade),
            "data_source": ("default and limit_option", default or limit_option),
            "tokenizer": ("from_name", from_name),
            "evaluator": ("best_metric", best_metric),
            "logger": ("check", check),
        })  # fmt: skip
        self._registry.add(
            Entry(
                kind=kind,
                name=name,
                config=config,
                factory=factory,
                summary=summary,
                requires=tuple(requires),
                install=install,
                defaults=dict(defaults or {}),
                aliases=dict(aliases or {}),
                in_process=in_process,
                check=check,
                model_version=ModelVersion(version, upgrade),
                default=default,
                limit_option=limit_option,
                from_name=from_name,
                best_metric=best_metric,
                plugin=self.plugin,
                distribution=self.distribution,
                version=self.version,
            )
        )


def _check_targets(name: str, targets: Mapping[str, str]) -> None:
    for what, target in targets.items():
        if what != "factory" and not target:
            continue
        if not isinstance(target, str) or not re.fullmatch(r"[\w.]+:\w+", target):
            raise PluginError(f'{what} of {name!r} must be "module:attribute", not {shorten(target)}')


def _check_types(name: str, requires: Iterable[str], arguments: Mapping[str, tuple[Any, type]]) -> None:
    if isinstance(requires, str) or not all(isinstance(module, str) and module for module in requires):
        raise PluginError(f"requires of {name!r} must be a list of names of modules, not {shorten(requires)}")
    for what, (given, wanted) in arguments.items():
        if not isinstance(given, wanted):
            raise PluginError(f"{what} of {name!r} must be a {wanted.__name__}, not {shorten(given)}")


def _check_kind(kind: str, name: str, arguments: Mapping[str, tuple[str, Any]]) -> None:
    """Refuse arguments that only entries of another kind have."""
    for owner, (what, given) in arguments.items():
        if given and kind != owner:
            raise PluginError(f"{kind} {name!r}: only {owner.replace('_', ' ')}s have {what}")


@attrs.frozen
class Command:
    """A command that a plugin adds.

    Args:
        module: imported when the command is called; has ``add_arguments(parser)`` and ``main(options, arguments)``,
            which returns the exit code. A NanochatError is printed without a traceback.
    """

    name: str
    module: str
    summary: str
    plugin: str
    distribution: str


@attrs.frozen
class CommandRegistrar:
    """A plugin's view of the commands, which adds commands in the plugin's name."""

    _commands: list[Command]
    _plugin: str
    _distribution: str

    def add(self, name: str, *, module: str, summary: str) -> None:
        """Register the command ``nanochat <name>``. The arguments are those of ``Command``.

        Raises:
            PluginError: when an argument is malformed, or another plugin has the name.
        """
        if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9]+([-_][a-z0-9]+)*", name) or len(name) > 40:
            raise PluginError(
                f"the name of a command must be up to 40 lower-case letters and digits, with single - or _ between "
                f"them, not {shorten(name)}"
            )
        if not isinstance(module, str) or not re.fullmatch(r"\w+(\.\w+)*", module):
            raise PluginError(f"module of command {name!r} must be the name of a module, not {shorten(module)}")
        _check_text(f"summary of command {name!r}", summary)
        if not summary:
            raise PluginError(f"command {name!r} needs a summary of one line")
        for other in self._commands:
            if other.name == name:
                raise PluginError(f"{other.distribution} (plugin {other.plugin!r}) has a command {name!r} already")
        self._commands.append(Command(name, module, summary, self._plugin, self._distribution))
