"""Line numbers of TOML keys."""

from __future__ import annotations

import tomllib
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from nanochat_core.config.toml_lines import line_numbers

TEXT = '''# a comment with [brackets] and key = 1

title = "x"
text = """
[no.table]
key = 1
"""
literal = \'\'\'
= [[
\'\'\'
numbers = [
  1,  # one ]
  2,
]
"quoted key" = 1
dotted.key.deep = 2
inline = {a = 1, b = {c = 2}}
pairs = [{x = 1}, {x = 2}]

[table] # trailing
  indented = true
"a.b" = 3

[outer."inner table".leaf]
x = 1

[[list]]
first = 1
[list.sub]
y = 2
[[list]]

first = 2
[[list.deep]]
z = 1
[[list.deep]]
z = 2
'''


def test_every_kind_of_statement() -> None:
    lines = line_numbers(TEXT)
    expected = {
        ("title",): 3,
        ("text",): 4,
        ("literal",): 8,
        ("numbers",): 11,
        ("quoted key",): 15,
        ("dotted", "key", "deep"): 16,
        ("inline",): 17,
        ("inline", "b", "c"): 17,
        ("pairs", 1, "x"): 18,
        ("table",): 20,
        ("table", "indented"): 21,
        ("table", "a.b"): 22,
        ("outer", "inner table", "leaf"): 24,
        ("outer", "inner table", "leaf", "x"): 25,
        ("list", 0): 27,
        ("list", 0, "first"): 28,
        ("list", 0, "sub", "y"): 30,
        ("list", 1): 31,
        ("list", 1, "first"): 33,
        ("list", 1, "deep", 0, "z"): 35,
        ("list", 1, "deep", 1): 36,
        ("list", 1, "deep", 1, "z"): 37,
    }
    assert {path: lines.get(path) for path in expected} == expected


def test_windows_line_ends_and_a_missing_last_one() -> None:
    assert line_numbers("a = 1\r\n\r\nb = [\r\n1]\r\nc = 2") == {("a",): 1, ("b",): 3, ("c",): 5}


def test_characters_that_only_unicode_calls_line_ends() -> None:
    text = '# a\u2028b = 1\nfirst = "x\u2028\u0085y"\n# \u0085\nsecond = 2\n'
    assert line_numbers(text) == {("first",): 2, ("second",): 4}


def test_nothing() -> None:
    assert line_numbers("") == {}
    assert line_numbers("# only a comment") == {}


KEYS = st.sampled_from(["a", "b", '"c d"', "'e.f'", "g-h"])
VALUES = st.sampled_from(
    ["1", "true", '"s"', '"""\nx = 1\n[y]\n"""', "'''\n[[z]]\n'''", "[\n1,\n]", "[ # [\n]", "{k = 1}", "[{k = 1}]"]
)


@given(st.lists(st.tuples(KEYS, VALUES), max_size=5, unique_by=lambda pair: pair[0]), st.lists(KEYS, max_size=3))
def test_the_line_of_a_key_is_where_it_is_written(statements: list[tuple[str, str]], table: list[str]) -> None:
    lines = [f"[{'.'.join(table)}]"] if table else []
    written: dict[tuple[Any, ...], int] = {}
    prefix = tuple(k.strip("\"'") for k in table)
    for key, value in statements:
        lines.append("# between")
        written[(*prefix, key.strip("\"'"))] = len("\n".join(lines).split("\n")) + 1
        lines.append(f"{key} = {value}")
    text = "\n".join(lines)
    tomllib.loads(text)
    found = line_numbers(text)
    assert {path: found.get(path) for path in written} == written
