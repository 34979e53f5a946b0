"""TOML within limits: what exceeds them is refused with key and line, and parsing takes linear time."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from nanochat_core.config.parse import DEEPEST, NotAccepted, parse_toml, parse_value


@pytest.mark.parametrize(
    ("text", "key", "line", "message"),
    [
        ("a = 1\nb = 9223372036854775808", "b", 2, "64 bits"),
        ("[t]\n\nb = [1, -9223372036854775809]", "t.b", 3, "64 bits"),
        (f"a = 1\nb = 0x{'f' * 5000}", "b", 2, "64 bits"),
        (f"a = 1\nb = {'9' * 5000}", "", 2, "digits"),
        ("[t]\na = " + "[" * 40 + "]" * 40, "t.a", 2, "nested too deeply"),
        ("a = " + "[" * 3000, "", 0, "nested too deeply"),
        ("a = " + "{b = " * 3000, "", 0, "nested too deeply"),
        ("a = 1\n" + "b." * DEEPEST + "b = 1", "", 2, "more than 32 parts"),
        ("[" + "b." * 5000 + "b]", "", 1, "more than 32 parts"),
        ("a = 1\nb = 2024-02-31", "", 2, "not valid"),
        ("a = 1\nb\n", "", 2, "not valid TOML"),
    ],
)
def test_what_exceeds_a_limit(text: str, key: str, line: int, message: str) -> None:
    with pytest.raises(NotAccepted, match=message) as caught:
        parse_toml(text)
    assert (caught.value.key, caught.value.line) == (key, line)


def test_what_is_just_within_them() -> None:
    deep = "[" * (DEEPEST - 1) + "]" * (DEEPEST - 1)
    content, lines = parse_toml(f"a = {deep}\nb = {2**63 - 1}\nc = -{2**63}\n" + "d." * (DEEPEST - 1) + "d = 1")
    assert content["b"] == 2**63 - 1
    assert lines["b",] == 2


@pytest.mark.parametrize("text", ["1" + "0" * 30, "9" * 5000, "[" * 3000, "{a = " * 3000, "[" * 40 + "]" * 40])
def test_values_that_exceed_them(text: str) -> None:
    with pytest.raises(NotAccepted):
        parse_value(text)


@pytest.mark.parametrize("text", ["", "a b", '"', "1\nother = 2", "2024-02-31"])
def test_what_is_no_value(text: str) -> None:
    with pytest.raises(tomllib.TOMLDecodeError):
        parse_value(text)


@pytest.mark.parametrize(
    "text",
    [
        "tags = [\n" + '  "x",\n' * 4000 + "]\n",
        'text = """\n' + "line [\n" * 4000 + '"""\n',
        "".join(f"key_{n} = {n}\n" for n in range(4000)),
        "".join(f"[[entries]]\nname = 'x{n}'\n" for n in range(2000)),
    ],
)
def test_each_line_is_parsed_twice_at_most(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    parsed, loads = [], tomllib.loads

    def count(part: str) -> dict[str, Any]:
        parsed.append(len(part))
        return loads(part)

    monkeypatch.setattr(tomllib, "loads", count)
    _, lines = parse_toml(text)
    assert sum(parsed) <= 2 * len(text)
    assert max(lines.values()) <= text.count("\n")
