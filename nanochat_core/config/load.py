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
from nanochat_core.files import name_problem
from nanochat_core.plugins.choice import PLUGIN_LISTS, PLUGIN_TABLES, RESERVED, Choice, EntryKeys
from nanochat_core.plugins.discovery import Plugins
from nanochat_core.plugins.options import shown
from nanochat_core.plugins.structure import Mismatch, converter, fields_of, takes_text

MOST_PROBLEMS = 100  # of an experiment that are told


@attrs.frozen
class LoadedExperiment:
    """The result of ``load``.

    Args:
        experiment: the experiment; "auto" values are not resolved.
        origins: dotted key to origin, for every value, defaults included.
        missing: plugins or libraries that are not installed. ``show`` and ``plan`` continue without them, ``run`` does
            not.
    """

    experiment: Experiment
    origins: dict[str, Origin]
    missing: tuple[Problem, ...] = ()

    def require_all(self) -> LoadedExperiment:
        """Raise a ConfigError if a plugin or library is missing."""
        if self.missing:
            raise ConfigError(self.missing)
        return self

    def keep(self, values: Mapping[str, Any], run: str) -> LoadedExperiment:
        """Return a copy in which options of the core's tables have the values of an earlier run.

        Args:
            values: by dotted key, such as ``train.compile``.
            run: the run they are kept from, as the origin names it.
        """
        experiment, origins = self.experiment, dict(self.origins)
        for key, value in values.items():
            table, _, option = key.partition(".")
            changed: dict[str, Any] = {table: attrs.evolve(getattr(experiment, table), **{option: value})}
            experiment = attrs.evolve(experiment, **changed)
            origins[key] = origins[key].kept_from(run)
        return attrs.evolve(self, experiment=experiment, origins=origins)


@attrs.frozen
class Tables:
    """Tables from a source other than the experiment's file. They override the file; ``--set`` overrides them.

    Args:
        content: options by table; entries of a list by table and name.
        origin: where they come from, such as a checkpoint or an option of the command.
        replace: tables of the file with these names are replaced instead of merged.
    """

    content: Mapping[str, Mapping[str, Any]]
    origin: str
    replace: bool = False


def load(
    file: str | Path | None,
    overrides: Iterable[str],
    plugins: Plugins,
    tables: Sequence[Tables] = (),
    *,
    complete: bool = True,
) -> LoadedExperiment:
    """Read an experiment.

    Args:
        file: the TOML file; None when everything comes from ``tables`` and ``overrides``.
        overrides: ``key=value`` texts; list entries are addressed by name, as in ``evaluators.NAME.every=50``.
        plugins: the installed plugins.
        tables: tables between the file and the overrides, lowest first.
        complete: whether every part must name its plugin. If not, a part that no table names a plugin for becomes a
            Choice without an entry.

    Raises:
        ConfigError: with every problem found.
    """
    problems: list[Problem] = []
    layers = read_layers(Path(file), problems) if file is not None else []
    tree: Tree = {}
    for index, (layer, places) in enumerate(layers):
        merge_layer(tree, layer, places, index, problems)
    index = len(layers)
    for added in tables:
        for table in added.content if added.replace else ():
            tree.pop(table, None)
        merge_layer(tree, added.content, {(): added.origin}, index, problems)
        index += 1
    merge_overrides(tree, list(overrides), index, problems)
    default_name = Path(file).stem if file is not None else "tables"
    return _Structurer(tree, plugins, problems, default_name, complete).finish()


class _Structurer:
    """The conversion of the merged tree to an Experiment, which collects problems, origins and missing plugins."""

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
            problems = [*self.problems, *self.missing]
            more = [Problem("", f"and {len(problems) - MOST_PROBLEMS:,} more")] * (len(problems) > MOST_PROBLEMS)
            raise ConfigError([*problems[:MOST_PROBLEMS], *more])
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
        """Keep, of options that exclude each other, the one of the highest layer."""
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
        """Set a ``best_metric`` that is not given to that of the first evaluator that has one."""
        if checkpoint is None or checkpoint.best_metric is not None:
            return checkpoint
        for choice in evaluators:
            if choice.entry is not None and choice.entry.best_metric:
                self.origins["checkpoint.best_metric"] = Origin(f"default: the metric of {choice.table}")
                return attrs.evolve(checkpoint, best_metric=choice.metric_name(choice.entry.best_metric))
        if checkpoint.keep_best is not None and not self.missing:
            message = "missing: keep_best needs a metric, and no evaluator of the experiment has a default for it"
            self._problem(("checkpoint", "best_metric"), message, self._table("checkpoint")["keep_best"])
        return checkpoint

    def _structure(self, cls: type, path: Path_, table: Tree, owner: str = "", place: Any = None) -> Any:
        """An instance of an attrs class, or None after noting every problem, by default at ``place``."""
        try:
            config: Any = converter.structure(_values(table, fields_of(cls)), cls)
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
        """The plugin entry that a table picks, with its config; None after noting every problem."""
        if not self.complete and not table:
            return Choice(EntryKeys(""), None, {})
        chosen = self._chosen(path, table, kind)
        if chosen is None:
            return None
        reserved_class = RESERVED.get(kind, EntryKeys)
        reserved = list(fields_of(reserved_class))
        registry = self.plugins[kind]
        entry = registry.get(chosen.value)
        if entry is not None:
            for old, new in entry.aliases.items():
                self._apply_alias(path, table, old, new)
        own = {k: v for k, v in table.items() if k not in reserved}
        kept = {k: v for k, v in table.items() if k in reserved} | {"plugin": chosen}
        if "name" in reserved:
            kept.setdefault("name", Value(path[-1], chosen.origin))
        if entry is None:
            return self._unknown_choice(path, kind, chosen, reserved_class, kept, own)
        missing = entry.missing()
        if missing:
            what = "its library is" if len(missing) == 1 else "its libraries are"
            message = f"{what} missing ({', '.join(missing)}); in your environment: {entry.how_to_install()}"
            self.missing.append(Problem(".".join(path), message, chosen.origin.text))
        for key, default in entry.defaults.items():
            kept.setdefault(key, Value(default, DEFAULT))
        owner = f' of {_word(kind)} plugin "{entry.name}"'
        known = fields_of(entry.config)
        for key in [key for key in own if key not in known]:
            # The core's keys are suggested too.
            hint = did_you_mean(key, [*known, *reserved, *(["remove"] if len(path) == 2 else [])])
            self._problem((*path, key), f"unknown key{owner}{hint}", own.pop(key))
        keys = self._structure(reserved_class, path, kept)
        config = self._structure(entry.config, path, own, owner=owner, place=chosen)
        if keys is None or config is None:
            return None
        origins = {key: self.origins[key] for key in (".".join((*path, name)) for name in (*known, *reserved))}
        at = first_origin(chosen) or first_origin(table)  # of options that keep their default
        return Choice(keys, entry, config, {key: o.text if o.layer >= 0 else at for key, o in origins.items()})

    def _chosen(self, path: Path_, table: Tree, kind: Any) -> Value | None:
        """The plugin's name that a table gives; by default, the name of its entry."""
        registry = self.plugins[kind]
        chosen = table.get("plugin")
        if chosen is None and len(path) == 2 and isinstance(table, dict) and registry.claims(path[1]):
            chosen = Value(path[1], DEFAULT)
        if isinstance(chosen, Value):
            chosen = attrs.evolve(chosen, value=chosen.as_text)
        if not isinstance(chosen, Value) or not isinstance(chosen.value, str):
            names = ", ".join(e.name for e in registry) or "none"
            message = f"missing: name a {_word(kind)} plugin (installed: {names})"
            self._problem((*path, "plugin"), message, chosen or table)
            return None
        problem = name_problem(chosen.value)
        if problem:
            self._problem((*path, "plugin"), f"{problem}: {shown(chosen.value)}", chosen)
            return None
        return chosen

    def _unknown_choice(
        self, path: Path_, kind: Any, chosen: Value, keys_class: type[EntryKeys], kept: Tree, own: Tree
    ) -> Choice | None:
        """A choice without entry, for commands that continue without the plugin, such as ``nanochat show``."""
        registry, name = self.plugins[kind], chosen.value
        if registry.claims(name):
            self._problem((*path, "plugin"), registry.explain_clash(name), chosen)
            return None
        message = f'no {_word(kind)} plugin "{name}" is installed{registry.suggest(name)}'
        message += "; install the package that provides it" + self.plugins.explain_failure(name)
        self.missing.append(Problem(".".join((*path, "plugin")), message, chosen.origin.text))
        keys = self._structure(keys_class, path, kept)
        for key in fields_of(keys_class):
            if key not in kept:  # the plugin may have a default of its own
                self.origins.pop(".".join((*path, key)), None)
        self.origins |= {".".join((*path, key)): Origin(first_origin(value), 0) for key, value in own.items()}
        return None if keys is None else Choice(keys, None, plain_values(own))

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


def _values(table: Tree, fields: Mapping[str, Any]) -> Tree:
    """The values of a table; those of ``--set`` are taken as they are written where an option takes text."""
    values: Tree = plain_values(table)
    for name, given in table.items():
        if isinstance(given, Value) and name in fields and takes_text(fields[name].type):
            values[name] = given.as_text
    return values


def _word(kind: str) -> str:
    return kind.replace("_", " ")
