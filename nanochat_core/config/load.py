"""TOML files, ``extends`` and ``--set`` to an Experiment, with the provenance of every value; and back to TOML."""

from __future__ import annotations

import datetime
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import tomli_w

from nanochat_core.config.schema import (
    CORE_TABLES,
    HORIZONS,
    PLUGIN_LISTS,
    PLUGIN_TABLES,
    RESERVED,
    TABLES,
    WARMUPS,
    Choice,
    EntryKeys,
    Experiment,
    Mismatch,
    converter,
    fields_of,
    to_plain,
)
from nanochat_core.config.toml_lines import KeyPath, line_numbers
from nanochat_core.errors import ConfigError, NanochatError, Problem, did_you_mean
from nanochat_core.plugins.discovery import Plugins

Path_ = tuple[str, ...]


@attrs.frozen
class Origin:
    """Where a value came from.

    Args:
        text: ``file:line``, ``--set``, ``default``, or the formula of an auto value.
        layer: 0 for the innermost base file, rising towards ``--set``; -1 for defaults.
    """

    text: str
    layer: int = -1


DEFAULT = Origin("default")


@attrs.frozen
class Value:
    """A leaf of the merged tree."""

    value: Any
    origin: Origin


Tree = dict[str, Any]  # nested, leaves are Value


def add_places(error: NanochatError, origins: Mapping[str, Origin]) -> None:
    """Put file and line in front of a message that begins with a key of the experiment, in place."""

    def place(key: str) -> str:
        origin = origins.get(key)
        return "" if origin is None or origin.layer < 0 else origin.text

    if isinstance(error, ConfigError):
        keys = [p.key or p.message.partition(": ")[0] for p in error.problems]
        placed = zip(error.problems, keys, strict=True)
        error.problems = tuple(attrs.evolve(p, where=p.where or place(key)) for p, key in placed)
        error.args = ("\n".join(map(str, error.problems)),)
    elif place(str(error).partition(": ")[0]):
        error.args = (f"{place(str(error).partition(': ')[0])}: {error}",)


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
        overrides: ``key=value`` texts; list entries are addressed by name, as in ``evaluators.bpb.every=50``.
        plugins: what is installed.
        instead: tables that stand in for those of the file; ``instead_from``: where they come from.

    Raises:
        ConfigError: with every problem found.
    """
    problems: list[Problem] = []
    layers = _read_layers(Path(file), problems)
    tree: Tree = {}
    for index, (layer, where) in enumerate(layers):
        _merge(tree, layer, where, index, problems)
    for table, content in (instead or {}).items():
        tree[table] = {key: Value(value, Origin(instead_from, 0)) for key, value in content.items()}
    _merge_overrides(tree, list(overrides), len(layers), problems)
    return _Structurer(tree, plugins, problems, default_name=Path(file).stem).finish()


# ------------------------------------------------------------------------------------------------ files to layers

_Where = Mapping[Path_, str]


def _read_layers(file: Path, problems: list[Problem]) -> list[tuple[Tree, _Where]]:
    """The chain of ``extends``, base first: plain trees with list entries keyed by name, and where each key stands."""
    layers: list[tuple[Tree, _Where]] = []
    seen: list[Path] = []
    current: Path | None = file
    asked = ""
    while current is not None:
        if current.resolve() in [p.resolve() for p in seen]:
            chain = " -> ".join(str(p) for p in [*seen, current])
            raise ConfigError([Problem("extends", f"files extend each other in a circle: {chain}", asked)])
        seen.append(current)
        try:
            text = current.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte-order mark
            raw = tomllib.loads(text)
        except FileNotFoundError:
            near = sorted(p.name for p in current.parent.glob("*.toml")) if current.parent.is_dir() else []
            hint = did_you_mean(current.name, near) or (f"; there is {', '.join(near)}" if near else "")
            raise ConfigError([Problem("extends" if asked else "", f"no file {current}{hint}", asked)]) from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError([Problem("", f"can't be read: {error}", str(current))]) from None
        except tomllib.TOMLDecodeError as error:
            line = re.search(r"at line (\d+)", str(error))
            place = f"{current}:{line[1]}" if line else str(current)
            raise ConfigError([Problem("", f"not valid TOML: {error}", place)]) from None
        lines = line_numbers(text)
        parent = raw.pop("extends", None)
        layers.insert(0, _named(raw, lines, str(current), problems))
        if parent is None:
            break
        asked = f"{current}:{lines.get(('extends',), 1)}"
        if not isinstance(parent, str):
            raise ConfigError([Problem("extends", "must be the name of one file", asked)])
        current = current.parent / parent
    return layers


def _named(
    raw: dict[str, Any], lines: Mapping[KeyPath, int], file: str, problems: list[Problem]
) -> tuple[Tree, _Where]:
    """Key list entries by name, and give every path its ``file:line``."""
    where: dict[Path_, str] = {(): file}
    renamed: dict[KeyPath, Path_] = {}
    tree: Tree = {}
    for table, content in raw.items():
        if table in PLUGIN_LISTS and isinstance(content, list):
            entries: Tree = {}
            for index, entry in enumerate(content):
                place = f"{file}:{lines.get((table, index), lines.get((table,), 1))}"
                if not isinstance(entry, dict):
                    problems.append(Problem(table, f"write each entry as [[{table}]]", place))
                    continue
                name = entry.get("name", entry.get("plugin"))
                if not isinstance(name, str):
                    problems.append(Problem(f"{table}[{index}]", 'needs a plugin = "..." or a name', place))
                    continue
                if name in entries:
                    problems.append(
                        Problem(f"{table}.{name}", "two entries have this name: give one another name = ...", place)
                    )
                    continue
                entries[name] = entry
                renamed[(table, index)] = (table, name)
            tree[table] = entries
        else:
            tree[table] = content
    for path, line in lines.items():
        for length in range(len(path), 0, -1):
            if path[:length] in renamed:
                path = renamed[path[:length]] + path[length:]
                break
        where[tuple(map(str, path))] = f"{file}:{line}"
    return tree, where


# -------------------------------------------------------------------------------------------------------- merging


def _place(where: _Where, path: Path_) -> str:
    """Where ``path`` stands, or the first key below it, or the nearest one above."""
    below = next((text for key, text in where.items() if key[: len(path)] == path), "")
    while path and path not in where and not below:
        path = path[:-1]
    return where.get(path, below)


def _merge(
    base: Tree, layer: Mapping[str, Any], where: _Where, index: int, problems: list[Problem], path: Path_ = ()
) -> None:
    """Lay ``layer`` over ``base``, in place."""
    for key, value in layer.items():
        here = (*path, key)
        is_entry = len(here) == 2 and path[0] in PLUGIN_LISTS
        if is_entry and not isinstance(value, dict):
            problems.append(Problem(".".join(here), "must be a table", _place(where, here)))
        elif is_entry and value.get("name", key) != key:
            message = f'an entry keeps its name, "{key}": remove it and add another'
            problems.append(Problem(".".join((*here, "name")), message, _place(where, (*here, "name"))))
        elif is_entry and "remove" in value:
            if value["remove"] is not True:
                message = "must be true, or left out to keep the entry"
                problems.append(Problem(".".join((*here, "remove")), message, _place(where, here)))
            elif key not in base:
                known = did_you_mean(key, base) or f" (inherited: {', '.join(base) or 'none'})"
                problems.append(Problem(".".join(here), f"nothing to remove{known}", _place(where, here)))
            base.pop(key, None)
        elif isinstance(value, dict):
            old = base.get(key)
            picks_plugin = is_entry or (len(here) == 1 and key in PLUGIN_TABLES)
            if picks_plugin and isinstance(old, dict) and "plugin" in value:
                plugin = old.get("plugin")
                was = plugin.value if isinstance(plugin, Value) else key
                if was != value["plugin"]:
                    old = None  # options of another plugin mean something else
            base[key] = old if isinstance(old, dict) else {}
            _merge(base[key], value, where, index, problems, here)
        else:
            base[key] = Value(value, Origin(_place(where, here), index))


def parse_override(text: str) -> tuple[Path_, Any]:
    """``a.b.c=VALUE``: the path, and VALUE as TOML; what is no TOML literal is a string.

    Raises:
        ConfigError: when there is no key or no ``=``.
    """
    key, equals, literal = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise ConfigError([Problem("", f"write key=value, as in model.depth=12, not {text!r}", "--set")])
    try:
        value = tomllib.loads(f"value = {literal}")["value"]
    except tomllib.TOMLDecodeError:
        value = literal.strip()
    if isinstance(value, datetime.date | datetime.time):
        value = literal.strip()
    return path, value


def _merge_overrides(tree: Tree, overrides: Sequence[str], index: int, problems: list[Problem]) -> None:
    layer: Tree = {}
    where: dict[Path_, str] = {(): "--set"}
    for text in overrides:
        try:
            path, value = parse_override(text)
        except ConfigError as error:
            problems += error.problems
            continue
        where[path] = f"--set {text}"
        node = layer
        for part in path[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                problems.append(Problem(".".join(path), "an earlier --set made this a value, not a table", "--set"))
                break
        else:
            node[path[-1]] = value
    for table in PLUGIN_LISTS:
        entries, names = layer.get(table), tree.get(table, {})
        if not isinstance(entries, dict) or not isinstance(names, dict):
            continue
        for name, entry in list(entries.items()):
            if name not in names and not (isinstance(entry, dict) and "plugin" in entry):
                hint = did_you_mean(name, names) or f" (there is: {', '.join(names) or 'none'})"
                message = f"no entry of this name{hint}; a new one needs --set {table}.{name}.plugin=..."
                problems.append(Problem(f"{table}.{name}", message, _place(where, (table, name))))
                del entries[name]
    _merge(tree, layer, where, index, problems)


# ------------------------------------------------------------------------------------------------- to an experiment


class _Structurer:
    """Turns the merged tree into an Experiment, collecting problems, origins and missing plugins."""

    def __init__(self, tree: Tree, plugins: Plugins, problems: list[Problem], default_name: str) -> None:
        self.tree, self.plugins, self.problems, self.default_name = tree, plugins, problems, default_name
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
        self.problems.append(Problem(".".join(path), message, _first_origin(at)))

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

    def _structure(self, cls: type, path: Path_, table: Tree, owner: str = "", place: Any = None) -> Any:
        """An instance of an attrs class, or None after noting every problem, at ``place`` what has none of its own."""
        try:
            config: Any = converter.structure(_plain(table), cls)
        except Mismatch as error:
            for inner, message in error.problems:
                at: Any = table
                for part in inner:
                    at = at[part] if isinstance(at, dict) and part in at else at
                at = at if _first_origin(at) else place
                self._problem((*path, *inner), message.replace("unknown key", f"unknown key{owner}"), at)
            return None
        for name in fields_of(cls):
            given = table.get(name)
            origin = given.origin if isinstance(given, Value) else DEFAULT
            self.origins[".".join((*path, name))] = (
                Origin(_first_origin(given), 0) if isinstance(given, dict) else origin
            )
        return config

    def _choice(self, path: Path_, table: Tree, kind: Any) -> Choice | None:
        """The plugin entry a table picks, with its config."""
        registry = self.plugins[kind]
        word = kind.replace("_", " ")
        chosen = table.get("plugin")
        if chosen is None and len(path) == 2 and isinstance(table, dict) and registry.claims(path[1]):
            chosen = Value(path[1], DEFAULT)
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
            self.origins |= {".".join((*path, key)): Origin(_first_origin(value), 0) for key, value in own.items()}
            return None if keys is None else Choice(keys, None, _plain(own))
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
        return Choice(keys, entry, config) if keys is not None and config is not None else None

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


def _plain(node: Any) -> Any:
    if isinstance(node, Value):
        return node.value
    return {key: _plain(value) for key, value in node.items()} if isinstance(node, dict) else node


def _first_origin(node: Any) -> str:
    if isinstance(node, Value):
        return "" if node.origin is DEFAULT else node.origin.text
    if isinstance(node, dict):
        for value in node.values():
            found = _first_origin(value)
            if found:
                return found
    return ""


# -------------------------------------------------------------------------------------------------------- and back


def to_tables(experiment: Experiment) -> dict[str, Any]:
    """The experiment as nested plain data, in the layout of a TOML file."""
    tables: dict[str, Any] = {}
    for table in TABLES:
        part = getattr(experiment, table)
        if isinstance(part, tuple):
            tables[table] = [_choice_table(choice) for choice in part]
        else:
            tables[table] = _choice_table(part) if isinstance(part, Choice) else to_plain(part)
    return {name: content for name, content in tables.items() if content}


def _choice_table(choice: Choice) -> dict[str, Any]:
    keys = to_plain(choice.keys)
    if keys.get("name") == keys["plugin"]:
        del keys["name"]
    return {**keys, **to_plain(choice.config)}


def dump(experiment: Experiment) -> str:
    """TOML that loads again to the same experiment."""
    return tomli_w.dumps(to_tables(experiment))


def changed_options(old: Experiment, new: Experiment) -> list[tuple[str, Any, Any, str]]:
    """Options that differ: (dotted key, old value, new value, the option's ``on_resume`` rule)."""
    table_rules = {"tokenizer": "refuse", "data": "refuse", "model": "refuse", "optimizer": "warn"}
    changes = []
    for table in TABLES:
        a, b = getattr(old, table), getattr(new, table)
        if isinstance(a, tuple):
            continue  # what evaluates and logs may change freely
        plain_a, plain_b = (_choice_table(x) if isinstance(x, Choice) else to_plain(x) for x in (a, b))
        config: Any = a.config if isinstance(a, Choice) else a
        fields = fields_of(type(config)) if attrs.has(type(config)) else {}
        if isinstance(a, Choice):
            fields |= fields_of(type(a.keys))
        for key in sorted(plain_a.keys() | plain_b.keys()):
            if plain_a.get(key) != plain_b.get(key):
                rule = fields[key].metadata.get("on_resume") if key in fields else None
                if key == "plugin":
                    rule = "refuse"  # a checkpoint holds one plugin's state
                rule = rule or table_rules.get(table, "free")
                changes.append((f"{table}.{key}", plain_a.get(key), plain_b.get(key), rule))
    return changes


def unverified_options(experiment: Experiment) -> dict[str, str]:
    """Options whose value is another than the default, and whose code never ran on the hardware it is for: dotted key
    to what never ran where. To be asked before each "auto" becomes a value."""
    found = {}
    for table in TABLES:
        part = getattr(experiment, table)
        for content in part if isinstance(part, tuple) else (part,):
            prefix = f"{table}.{content.name}" if isinstance(part, tuple) else table
            configs = (content.keys, content.config) if isinstance(content, Choice) else (content,)
            for config in filter(lambda c: attrs.has(type(c)), configs):
                for name, field in fields_of(type(config)).items():
                    note = field.metadata.get("unverified")
                    if note and getattr(config, name) != field.default:
                        found[f"{prefix}.{name}"] = note
    return found
