"""The core names no plugin, in no string either: what a plugin is called stands in the plugin."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.support import ROOT

from nanochat_core.plugins.discovery import load_plugins
from nanochat_core.plugins.distribution import NAME

CORE = ROOT / "nanochat_core"
# These names are words or endings of files besides; they count only where they can't be meant otherwise.
ORDINARY = {"aim", "bytes", "console", "core", "csv", "hf", "jsonl", "parquet", "samples", "text"}
# A generated experiment has to run, so that it picks plugins of ours; they are named there and nowhere else.
EXEMPT = {CORE / "plugins" / "scaffold" / "common" / "experiment.toml.txt"}


def plugin_names() -> tuple[set[str], set[str]]:
    """Names of registered entries of this distribution, and of its plugin packages."""
    registries = load_plugins("").registries.values()
    entries = [e for registry in registries for e in registry if e.distribution == NAME]
    return {e.name for e in entries}, {e.factory.partition(".")[0].partition(":")[0] for e in entries}


def texts(file: Path) -> Iterator[tuple[int, str, bool]]:
    """Line, text, and whether the text is picked as a plugin's name, of every string of a file."""
    source = file.read_text(encoding="utf-8")
    if file.suffix == ".txt":
        yield from ((number, line, False) for number, line in enumerate(source.splitlines(), start=1))
        return
    tree = ast.parse(source)
    picked = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name.endswith(("Keys", ".get", ".claims")) and (
                "Keys" in name or "registry" in name or "plugins[" in name
            ):
                picked |= {id(argument) for argument in node.args}
        elif isinstance(node, ast.Compare) and re.search(r"\bplugin$|\bentry\.name$", ast.unparse(node.left)):
            picked |= {id(right) for right in node.comparators}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value, id(node) in picked


def named(text: str, is_picked: bool, names: set[str], packages: set[str]) -> list[str]:
    """Which plugins a text names."""
    words = "|".join(sorted(names))
    found = set(re.findall(rf"(?<![\w.-])(?:{'|'.join(sorted(names - ORDINARY))})(?![\w-])", text))
    found |= set(re.findall(rf"""plugin"?\s*[=:]\s*["']({words})["']""", text))
    found |= set(re.findall(rf"(?:evaluators|loggers)\.({words})\b", text))
    found |= set(re.findall(rf"--(?:evaluator|source)[ =]({words})\b", text))
    found |= set(re.findall(rf"(?<!\w)({words}):(?=[\w/]|PATH)", text))
    found |= set(re.findall(rf"\b({'|'.join(sorted(packages))})\b", text))
    found |= {metric for metric in re.findall(r"\b(?:val|train)/(\w+)", text) if metric in names}
    return sorted(found | ({text} & names if is_picked else set()))


@pytest.fixture(scope="module")
def ours() -> tuple[set[str], set[str]]:
    return plugin_names()


def test_no_string_of_the_core_names_a_plugin(ours: tuple[set[str], set[str]]) -> None:
    names, packages = ours
    assert names >= ORDINARY | {"gpt", "bpb", "python_docs"}
    files = [f for end in ("py", "pyi", "txt") for f in CORE.rglob(f"*.{end}") if f not in EXEMPT]
    found = [
        f"{file.relative_to(ROOT)}:{line}: {', '.join(which)}"
        for file in sorted(files)
        for line, text, is_picked in texts(file)
        if (which := named(text, is_picked, names, packages))
    ]
    assert not found, "\n".join(found)


def test_what_is_exempt_names_plugins(ours: tuple[set[str], set[str]]) -> None:
    for file in EXEMPT:
        assert any(named(text, is_picked, *ours) for _, text, is_picked in texts(file))


@pytest.mark.parametrize(
    "code",
    [
        'x = "val/bpb"', '"""As ``evaluators.core.every``."""', 'load("plugin = \\"text\\"")', 'EntryKeys("bytes")',
        'plugins["tokenizer"].get("hf")', 'f"{a}: see tiktoken"', '"nanochat_gpt.model"', 'a.plugin == "csv"',
        '"--evaluator core"', '"hf:PATH"',
    ],
)  # fmt: skip
def test_names_are_found(code: str, ours: tuple[set[str], set[str]], tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(code)
    assert [which for _, text, is_picked in texts(tmp_path / "a.py") if (which := named(text, is_picked, *ours))]
