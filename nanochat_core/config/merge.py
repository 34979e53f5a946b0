"""Files that extend each other, and ``--set`` overrides, merged into one tree of values with origins."""

from __future__ import annotations

import datetime
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from nanochat_core.config.origins import DEFAULT, Origin
from nanochat_core.config.toml_lines import KeyPath, line_numbers
from nanochat_core.errors import ConfigError, Problem, did_you_mean
from nanochat_core.plugins.choice import PLUGIN_LISTS, PLUGIN_TABLES

Path_ = tuple[str, ...]


@attrs.frozen
class Value:
    """A leaf of the merged tree."""

    value: Any
    origin: Origin


Tree = dict[str, Any]  # nested, leaves are Value


Places = Mapping[Path_, str]


def read_layers(file: Path, problems: list[Problem]) -> list[tuple[Tree, Places]]:
    """The chain of ``extends``, base first: plain trees with list entries keyed by name, and the place of each key."""
    layers: list[tuple[Tree, Places]] = []
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
        layers.insert(0, entries_by_name(raw, lines, str(current), problems))
        if parent is None:
            break
        asked = f"{current}:{lines.get(('extends',), 1)}"
        if not isinstance(parent, str):
            raise ConfigError([Problem("extends", "must be the name of one file", asked)])
        current = current.parent / parent
    return layers


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
    return tree, where


def place_of(where: Places, path: Path_) -> str:
    """The place of ``path``, else of the first key below it, else of the nearest key above."""
    below = next((text for key, text in where.items() if key[: len(path)] == path), "")
    while path and path not in where and not below:
        path = path[:-1]
    return where.get(path, below)


def merge_layer(
    base: Tree, layer: Mapping[str, Any], where: Places, index: int, problems: list[Problem], path: Path_ = ()
) -> None:
    """Lay ``layer`` over ``base``, in place."""
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
                known = did_you_mean(key, base) or f" (inherited: {', '.join(base) or 'none'})"
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
            merge_layer(base[key], value, where, index, problems, here)
        else:
            base[key] = Value(value, Origin(place_of(where, here), index))


def parse_override(text: str) -> tuple[Path_, Any]:
    """``a.b.c=VALUE``: the path, and VALUE as TOML; anything that is not valid TOML is a string.

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


def merge_overrides(tree: Tree, overrides: Sequence[str], index: int, problems: list[Problem]) -> None:
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
                problems.append(Problem(f"{table}.{name}", message, place_of(where, (table, name))))
                del entries[name]
    merge_layer(tree, layer, where, index, problems)


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
