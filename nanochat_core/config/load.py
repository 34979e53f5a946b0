"""TOML files, ``extends`` and ``--set`` to an Experiment, with the provenance of every value; and back to TOML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from nanochat_core.config.merge import (
    Path_,
    Tree,
    Value,
    first_origin,
    merge_layer,
    merge_overrides,
    plain_values,
    read_layers,
)
from nanochat_core.config.origins import DEFAULT, Origin
from nanochat_core.config.schema import CORE_TABLES, HORIZONS, TABLES, WARMUPS, Checkpoint, Experiment
from nanochat_core.errors import ConfigError, Problem, did_you_mean
from nanochat_core.plugins.choice import PLUGIN_LISTS, PLUGIN_TABLES, RESERVED, Choice, EntryKeys
from nanochat_core.plugins.discovery import Plugins
from nanochat_core.plugins.structure import Mismatch, converter, fields_of


@attrs.frozen
class LoadedExperiment:
    """What ``load`` gives.

    Args:
        experiment: the experiment; "auto" values still say "auto".
        origins: dotted key to origin, for every value, defaults included.
        missing: plugins or libraries that are not installed. ``show`` and ``plan`` go on without, ``run`` does not.
    """

    experiment: Experiment
    origins: dict[str, Origin]
    missing: tuple[Problem, ...] = ()

    def require_all(self) -> LoadedExperiment:
        """Raise a ConfigError if a plugin or library is missing."""
        if self.missing:
            raise ConfigError(self.missing)
        return self


def load(
    file: str | Path,
    overrides: Iterable[str],
    plugins: Plugins,
    instead: Mapping[str, Mapping[str, Any]] | None = None,
    instead_from: str = "",
) -> LoadedExperiment:
    """Read an experiment.

    Args:
        file: the TOML file.
        overrides: ``key=value`` texts; list entries are addressed by name, as in ``evaluators.NAME.every=50``.
        plugins: what is installed.
        instead: tables that stand in for those of the file; ``instead_from``: where they come from.

    Raises:
        ConfigError: with every problem found.
    """
    problems: list[Problem] = []
    layers = read_layers(Path(file), problems)
    tree: Tree = {}
    for index, (layer, where) in enumerate(layers):
        merge_layer(tree, layer, where, index, problems)
    for table, content in (instead or {}).items():
        tree[table] = {key: Value(value, Origin(instead_from, 0)) for key, value in content.items()}
    merge_overrides(tree, list(overrides), len(layers), problems)
    return _Structurer(tree, plugins, problems, default_name=Path(file).stem).finish()


def load_tables(
    tables: Mapping[str, Mapping[str, Any]], where: str, overrides: Iterable[str], plugins: Plugins
) -> LoadedExperiment:
    """Make an experiment of tables instead of a file, for those who need only some of its parts.

    Args:
        tables: as in a TOML file. A part that no table names a plugin for is a Choice without an entry.
        where: where the values come from, for messages.
        overrides, plugins: as for ``load``.

    Raises:
        ConfigError: with every problem found.
    """
    problems: list[Problem] = []
    tree: Tree = {}
    merge_layer(tree, tables, {(): where}, 0, problems)
    merge_overrides(tree, list(overrides), 1, problems)
    return _Structurer(tree, plugins, problems, default_name="tables", complete=False).finish()


# ------------------------------------------------------------------------------------------------ files to layers


# -------------------------------------------------------------------------------------------------------- merging


# ------------------------------------------------------------------------------------------------- to an experiment


class _Structurer:
    """Turns the merged tree into an Experiment, collecting problems, origins and missing plugins."""

    def __init__(
        self, tree: Tree, plugins: Plugins, problems: list[Problem], default_name: str, complete: bool = True
    ) -> None:
        self.tree, self.plugins, self.problems, self.default_name = tree, plugins, problems, default_name
        self.complete = complete  # every part must name its plugin
        self.origins: dict[str, Origin] = {}
        self.missing: list[Problem] = []

    def finish(self) -> LoadedExperiment:
        for table, content in self.tree.items():
            if table not in TABLES:
                self._problem((table,), f"unknown table{did_you_mean(table, TABLES)}", content)
            elif not isinstance(content, dict):
                self._problem(
                    (table,), "must be a list of tables" if table in PLUGIN_LISTS else "must be a table", content
                )
        train = self._table("train")
        self._one_of(train, HORIZONS)
        self._one_of(self._table("schedule"), WARMUPS)
        if not any(name in train for name in HORIZONS):
            train["target_param_data_ratio"] = Value(20.0, DEFAULT)
        parts: dict[str, Any] = {name: self._core_table(name) for name in CORE_TABLES}
        parts |= {name: self._choice((name,), self._table(name), kind) for name, kind in PLUGIN_TABLES.items()}
        for table, kind in PLUGIN_LISTS.items():
            entries = self._table(table)
            chosen = [self._choice((table, name), entry, kind) for name, entry in entries.items()]
            parts[table] = tuple(c for c in chosen if c is not None)
        parts["checkpoint"] = self._with_best_metric(parts["checkpoint"], parts["evaluators"])
        if self.problems:
            raise ConfigError([*self.problems, *self.missing])
        if not parts["run"].name:
            try:
                parts["run"] = attrs.evolve(parts["run"], name=self.default_name)
            except ValueError as error:
                raise ConfigError([Problem("run.name", f"the file's name {error}: give one in [run]")]) from None
            self.origins["run.name"] = Origin("default: the file's name")
        return LoadedExperiment(Experiment(**parts), self.origins, tuple(self.missing))

    def _table(self, name: str) -> Tree:
        content = self.tree.setdefault(name, {})
        return content if isinstance(content, dict) else {}

    def _problem(self, path: Path_, message: str, at: Any = None) -> None:
        self.problems.append(Problem(".".join(path), message, first_origin(at)))

    def _one_of(self, table: Tree, names: tuple[str, ...]) -> None:
        """Of options that exclude each other the one of the latest layer is in force."""
        given = {n: table[n].origin.layer for n in names if isinstance(table.get(n), Value)}
        latest = [n for n, layer in given.items() if layer == max(given.values())]
        if len(latest) > 1:
            path = "schedule" if names is WARMUPS else "train"
            places = ", ".join(f"{n} ({table[n].origin.text})" for n in latest)
            self._problem((path, latest[1]), f"give one of {', '.join(names)}, not several: {places}", table[latest[1]])
        for name in given:
            if name not in latest[:1]:
                del table[name]

    def _core_table(self, name: str) -> Any:
        return self._structure(CORE_TABLES[name], (name,), self._table(name))

    def _with_best_metric(self, checkpoint: Checkpoint | None, evaluators: Sequence[Choice]) -> Checkpoint | None:
        """``best_metric`` that is not given is that of the first evaluator that has one."""
        if checkpoint is None or checkpoint.best_metric is not None:
            return checkpoint
        for choice in evaluators:
            if choice.entry is not None and choice.entry.best_metric:
                self.origins["checkpoint.best_metric"] = Origin(f"default: the metric of {choice.table}")
                return attrs.evolve(checkpoint, best_metric=choice.metric_name(choice.entry.best_metric))
        if checkpoint.keep_best is not None and not self.missing:
            message = "missing: keep_best needs a metric, and no evaluator of the experiment has one of its own"
            self._problem(("checkpoint", "best_metric"), message, self._table("checkpoint")["keep_best"])
        return checkpoint

    def _structure(self, cls: type, path: Path_, table: Tree, owner: str = "", place: Any = None) -> Any:
        """An instance of an attrs class, or None after noting every problem, at ``place`` what has none of its own."""
        try:
            config: Any = converter.structure(plain_values(table), cls)
        except Mismatch as error:
            for inner, message in error.problems:
                at: Any = table
                for part in inner:
                    at = at[part] if isinstance(at, dict) and part in at else at
                at = at if first_origin(at) else place
                self._problem((*path, *inner), message.replace("unknown key", f"unknown key{owner}"), at)
            return None
        for name in fields_of(cls):
            given = table.get(name)
            origin = given.origin if isinstance(given, Value) else DEFAULT
            self.origins[".".join((*path, name))] = (
                Origin(first_origin(given), 0) if isinstance(given, dict) else origin
            )
        return config

    def _choice(self, path: Path_, table: Tree, kind: Any) -> Choice | None:
        """The plugin entry a table picks, with its config."""
        registry = self.plugins[kind]
        word = kind.replace("_", " ")
        chosen = table.get("plugin")
        if chosen is None and len(path) == 2 and isinstance(table, dict) and registry.claims(path[1]):
            chosen = Value(path[1], DEFAULT)
        if chosen is None and not self.complete and not table:
            return Choice(EntryKeys(""), None, {})
        if not isinstance(chosen, Value) or not isinstance(chosen.value, str):
            names = ", ".join(e.name for e in registry) or "none"
            self._problem((*path, "plugin"), f"missing: name a {word} plugin (installed: {names})", chosen or table)
            return None
        name = chosen.value
        reserved_class = RESERVED.get(kind, EntryKeys)
        reserved_names = list(fields_of(reserved_class))
        entry = registry.get(name)
        if entry is None:
            if registry.claims(name):
                self._problem((*path, "plugin"), registry.explain_clash(name), chosen)
                return None
            message = f'no {word} plugin "{name}" is installed{registry.suggest(name)}'
            message += "; install the package that brings it" + self.plugins.explain_failure(name)
            self.missing.append(Problem(".".join((*path, "plugin")), message, chosen.origin.text))
            kept = {k: v for k, v in table.items() if k in reserved_names} | {"plugin": chosen}
            if "name" in reserved_names:
                kept.setdefault("name", Value(path[-1], chosen.origin))
            keys = self._structure(reserved_class, path, kept)
            for key in reserved_names:
                if key not in kept:  # the plugin may have a default of its own
                    self.origins.pop(".".join((*path, key)), None)
            own = {k: v for k, v in table.items() if k not in reserved_names}
            self.origins |= {".".join((*path, key)): Origin(first_origin(value), 0) for key, value in own.items()}
            return None if keys is None else Choice(keys, None, plain_values(own))
        missing = entry.missing()
        if missing:
            what = "its library is" if len(missing) == 1 else "its libraries are"
            message = f"{what} missing ({', '.join(missing)}); in your environment: {entry.how_to_install()}"
            self.missing.append(Problem(".".join(path), message, chosen.origin.text))
        for old, new in entry.aliases.items():
            self._apply_alias(path, table, old, new)
        own = {k: v for k, v in table.items() if k not in reserved_names}
        kept = {k: v for k, v in table.items() if k in reserved_names}
        kept["plugin"] = chosen
        if "name" in reserved_names:
            kept.setdefault("name", Value(path[-1], chosen.origin))
        for key, default in entry.defaults.items():
            kept.setdefault(key, Value(default, DEFAULT))
        known = fields_of(entry.config)
        for key in list(own):
            if key not in known:  # suggest among the core's keys too
                hint = did_you_mean(key, [*known, *reserved_names, *(["remove"] if len(path) == 2 else [])])
                self._problem((*path, key), f'unknown key of {word} plugin "{name}"{hint}', own.pop(key))
        keys = self._structure(reserved_class, path, kept)
        config = self._structure(entry.config, path, own, owner=f' of {word} plugin "{name}"', place=chosen)
        if keys is None or config is None:
            return None
        origins = {key: self.origins[key] for key in (".".join((*path, name)) for name in (*known, *reserved_names))}
        at = first_origin(chosen) or first_origin(table)  # of what is left at its default
        return Choice(keys, entry, config, {key: o.text if o.layer >= 0 else at for key, o in origins.items()})

    def _apply_alias(self, path: Path_, table: Tree, old: str, new: str) -> None:
        if old not in table:
            return
        alias = table.pop(old)
        current = table.get(new)
        if isinstance(current, Value) and isinstance(alias, Value):
            if current.origin.layer == alias.origin.layer:
                self._problem((*path, old), f"is another name of {new}, and both are given: drop one", alias)
                return
            if current.origin.layer > alias.origin.layer:
                return
        table[new] = alias


# -------------------------------------------------------------------------------------------------------- and back
