"""Line numbers of TOML keys. tomllib has none, but parsing growing chunks of statements finds them cheaply."""

from __future__ import annotations

import tomllib
from typing import Any

KeyPath = tuple[str | int, ...]


def line_numbers(text: str) -> dict[KeyPath, int]:
    """Line (from 1) at which each table and value of a valid TOML text starts; integers index arrays of tables."""
    lines = [f"{line}\n" for line in text.split("\n")]  # not splitlines: it knows ends of lines that TOML does not
    found: dict[KeyPath, int] = {}
    counts: dict[KeyPath, int] = {}
    prefix: KeyPath = ()
    start = 0
    while start < len(lines):
        end, parsed = start, None
        while parsed is None and end < len(lines):
            end += 1
            try:
                parsed = tomllib.loads("".join(lines[start:end]))
            except tomllib.TOMLDecodeError:
                continue
        statement = lines[start].lstrip()
        if parsed is not None and statement.startswith("["):
            names = _only_path(parsed)
            prefix = ()
            for position, name in enumerate(names):
                prefix += (name,)
                last = position == len(names) - 1
                if last and statement.startswith("[["):
                    counts[prefix] = counts.get(prefix, -1) + 1
                if prefix in counts:
                    prefix += (counts[prefix],)
            found.setdefault(prefix, start + 1)
        elif parsed is not None:
            for path in _leaves(parsed):
                found[prefix + path] = start + 1
        start = end
    return found


def _only_path(parsed: dict[str, Any]) -> list[str]:
    names = []
    node: Any = parsed
    while node:
        (name,) = node
        names.append(name)
        node = node[name][0] if isinstance(node[name], list) else node[name]
    return names


def _leaves(node: dict[str, Any], path: KeyPath = ()) -> list[KeyPath]:
    paths: list[KeyPath] = []
    for key, value in node.items():
        paths.append((*path, key))
        if isinstance(value, dict):
            paths += _leaves(value, (*path, key))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, dict):
                    paths += [(*path, key, index), *_leaves(item, (*path, key, index))]
    return paths
