"""Files that extend each other, and ``--set`` overrides, merged into one tree of values with origins."""

from __future__ import annotations

import datetime
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from nanochat_core.config.origins import DEFAULT, Origin
from nanochat_core.config.parse import DEEPEST, LARGEST_FILE, NotAccepted, parse_toml, parse_value
from nanochat_core.config.toml_lines import KeyPath
from nanochat_core.errors import ConfigError, Problem, did_you_mean
from nanochat_core.files import expand_path, first_few, read_regular, shorten
from nanochat_core.plugins.choice import PLUGIN_LISTS, PLUGIN_TABLES

LONGEST_CHAIN = 32  # files that extend each other

Path_ = tuple[str, ...]


@attrs.frozen
class Value:
    """A leaf of the merged tree.

    Args:
        text: the value as it is written in ``--set``; empty elsewhere.
    """

    value: Any
    origin: Origin
    text: str = ""

    @property
    def as_text(self) -> Any:
        """The value where text is wanted: in ``--set run.name=2024`` the quotes may be left out."""
        return self.text if self.text and isinstance(self.value, bool | int | float) else self.value


Tree = dict[str, Any]  # nested, leaves are Value


Places = Mapping[Path_, str]


def read_layers(file: Path, problems: list[Problem]) -> list[tuple[Tree, Places]]:
    """The chain of ``extends``, base first: plain trees with list entries keyed by name, and the place of each key."""
    layers: list[tuple[Tree, Places]] = []
    seen: list[Path] = []
    current, asked = file, ""
    while True:
        seen.append(current)
        raw, lines = _read(current, asked)
        parent = raw.pop("extends", None)
        layers.insert(0, entries_by_name(raw, lines, str(current), problems))
        if parent is None:
            return layers
        asked = f"{current}:{lines.get(('extends',), 1)}"
        if not isinstance(parent, str):
            raise ConfigError([Problem("extends", "must be the name of one file", asked)])
        current = current.parent / parent
        circle = any(os.path.realpath(current) == os.path.realpath(path) for path in seen if "\0" not in parent)
        if circle or len(seen) == LONGEST_CHAIN:
            chain = " -> ".join(str(p) for p in [*seen, current])
            why = "in a circle" if circle else f"more than {LONGEST_CHAIN} times"
            raise ConfigError([Problem("extends", f"files extend each other {why}: {chain}", asked)])


def _read(file: Path, asked: str) -> tuple[Tree, Mapping[KeyPath, int]]:
    """Return the content of an experiment file, and the line of each key.

    Args:
        asked: the place of the ``extends`` that names the file; empty for the experiment's own.

    Raises:
        ConfigError: when it does not exist, can't be read, or is not valid.
    """
    key = "extends" if asked else ""
    try:
        expand_path(str(file))
        text = read_regular(file, LARGEST_FILE).decode("utf-8-sig")  # some editors begin a file with a byte-order mark
        return parse_toml("\n".join(text.split("\r\n")))
    except FileNotFoundError:
        near = sorted(p.name for p in file.parent.glob("*.toml")) if file.parent.is_dir() else []
        hint = did_you_mean(file.name, near) or (f"; there is {first_few(near)}" if near else "")
        raise ConfigError([Problem(key, f"no file {file}{hint}", asked)]) from None
    except NotAccepted as error:
        place = f"{file}:{error.line}" if error.line else str(file)
        raise ConfigError([Problem(error.key, str(error), place)]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([Problem("", f"can't be read: it is not text in UTF-8 ({error})", str(file))]) from None
    except OSError as error:
        raise ConfigError([Problem("", f"can't be read: {error.strerror}", str(file))]) from None
    except ValueError as error:
        raise ConfigError([Problem(key, f"{shorten(str(file))} {error}", asked)]) from None


def entries_by_name(
    raw: dict[str, Any], lines: Mapping[KeyPath, int], file: str, problems: list[Problem]
) -> tuple[Tree, Places]:
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
                        Problem(
                            f"{table}.{name}",
                            "two entries have this name: give one of them a different name = ...",
                            place,
                        )
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
    return tree, _with_tables(where)


def _with_tables(where: Mapping[Path_, str]) -> Places:
    """Give each table that has no place that of the first key in it."""
    places = dict(where)
    for path, text in where.items():
        for length in range(1, len(path)):
            places.setdefault(path[:length], text)
    return places


def place_of(where: Places, path: Path_) -> str:
    """The place of ``path``, else of the nearest key above."""
    while path and path not in where:
        path = path[:-1]
    return where.get(path, "")


def merge_layer(
    base: Tree,
    layer: Mapping[str, Any],
    where: Places,
    index: int,
    problems: list[Problem],
    path: Path_ = (),
    literals: Mapping[Path_, str] | None = None,
) -> None:
    """Lay ``layer`` over ``base``, in place.

    Args:
        literals: ``Value.text`` of values.
    """
    for key, value in layer.items():
        here = (*path, key)
        is_entry = len(here) == 2 and path[0] in PLUGIN_LISTS
        if is_entry and not isinstance(value, dict):
            problems.append(Problem(".".join(here), "must be a table", place_of(where, here)))
        elif is_entry and value.get("name", key) != key:
            message = f'an entry keeps its name, "{key}": remove it and add another'
            problems.append(Problem(".".join((*here, "name")), message, place_of(where, (*here, "name"))))
        elif is_entry and "remove" in value:
            if value["remove"] is not True:
                message = "must be true, or left out to keep the entry"
                problems.append(Problem(".".join((*here, "remove")), message, place_of(where, here)))
            elif key not in base:
                known = did_you_mean(key, base) or f" (inherited: {first_few(list(base)) or 'none'})"
                problems.append(Problem(".".join(here), f"nothing to remove{known}", place_of(where, here)))
            base.pop(key, None)
        elif isinstance(value, dict):
            old = base.get(key)
            picks_plugin = is_entry or (len(here) == 1 and key in PLUGIN_TABLES)
            if picks_plugin and isinstance(old, dict) and "plugin" in value:
                plugin = old.get("plugin")
                was = plugin.value if isinstance(plugin, Value) else key
                if was != value["plugin"]:
                    old = None  # options of the previous plugin do not apply
            base[key] = old if isinstance(old, dict) else {}
            merge_layer(base[key], value, where, index, problems, here, literals)
        else:
            base[key] = Value(value, Origin(place_of(where, here), index), (literals or {}).get(here, ""))


def parse_override(text: str) -> tuple[Path_, Any]:
    """``a.b.c=VALUE``: the path, and VALUE as TOML; anything that is not valid TOML is a string.

    Raises:
        ConfigError: when there is no key or no ``=``, or the value exceeds a limit of ``parse_value``.
    """
    key, equals, literal = text.partition("=")
    literal = literal.strip()
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path) or len(path) > DEEPEST:
        raise ConfigError([Problem("", f"write key=value, as in model.depth=12, not {shorten(text)}", "--set")])
    try:
        value = parse_value(literal)
    except tomllib.TOMLDecodeError:
        value = literal
    except NotAccepted as error:
        raise ConfigError([Problem(".".join(path), str(error), "--set")]) from None
    if isinstance(value, datetime.date | datetime.time):
        value = literal
    return path, value


def merge_overrides(tree: Tree, overrides: Sequence[str], index: int, problems: list[Problem]) -> None:
    layer: Tree = {}
    where: dict[Path_, str] = {(): "--set"}
    literals: dict[Path_, str] = {}
    for text in overrides:
        try:
            path, value = parse_override(text)
        except ConfigError as error:
            problems += error.problems
            continue
        where[path] = f"--set {text}"
        literals[path] = text.partition("=")[2].strip()
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
                hint = did_you_mean(name, names) or f" (there is: {first_few(list(names)) or 'none'})"
                message = f"no entry of this name{hint}; a new one needs --set {table}.{name}.plugin=..."
                problems.append(Problem(f"{table}.{name}", message, place_of(_with_tables(where), (table, name))))
                del entries[name]
    merge_layer(tree, layer, _with_tables(where), index, problems, literals=literals)


def plain_values(node: Any) -> Any:
    if isinstance(node, Value):
        return node.value
    return {key: plain_values(value) for key, value in node.items()} if isinstance(node, dict) else node


def first_origin(node: Any) -> str:
    if isinstance(node, Value):
        return "" if node.origin is DEFAULT else node.origin.text
    if isinstance(node, dict):
        for value in node.values():
            found = first_origin(value)
            if found:
                return found
    return ""
