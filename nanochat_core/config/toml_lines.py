"""Line numbers of TOML keys. tomllib has none, but it can parse the statements of a valid text one by one."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from typing import Any

KeyPath = tuple[str | int, ...]


def line_numbers(text: str) -> dict[KeyPath, int]:
    """Line (from 1) at which each table and value of a valid TOML text starts; integers index arrays of tables."""
    found: dict[KeyPath, int] = {}
    counts: dict[KeyPath, int] = {}
    prefix: KeyPath = ()
    for line, statement in _statements(text):
        parsed = tomllib.loads(statement)
        if statement.startswith("["):
            names = _only_path(parsed)
            prefix = ()
            for position, name in enumerate(names):
                prefix += (name,)
                last = position == len(names) - 1
                if last and statement.startswith("[["):
                    counts[prefix] = counts.get(prefix, -1) + 1
                if prefix in counts:
                    prefix += (counts[prefix],)
            found.setdefault(prefix, line)
        else:
            for path in _leaves(parsed):
                found[prefix + path] = line
    return found


# What may hold the characters that end a statement or a list: strings and comments. A text that ends with quotes may
# have two of them before the three that close it.
_TOKEN = re.compile(
    r'''"""(?:[^"\\]|\\.|"(?!""))*"{3,5}|'{3}.*?'{3,5}|"(?:[^"\\]|\\.)*"|'[^']*'|\#[^\n]*|[\[\]{}\n]''', re.DOTALL
)


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Yield the statements of a valid TOML text, each with its first line (from 1)."""
    start, line, depth = 0, 1, 0
    for token in _TOKEN.finditer(f"{text}\n"):
        if token[0] == "\n" and depth == 0:
            statement = text[start : token.start()].strip(" \t\r")
            if statement and not statement.startswith("#"):
                yield line, statement
            line += text.count("\n", start, token.end())
            start = token.end()
        elif token[0] in ("[", "{"):
            depth += 1
        elif token[0] in ("]", "}"):
            depth -= 1


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
