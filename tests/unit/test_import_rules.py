"""What plugins may import from the core, and what must not import torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.support import ROOT

import nanochat_core
from nanochat_core.plugins.discovery import load_plugins

PLUGIN_FILES = sorted((ROOT / "plugins").rglob("*.py")) + sorted(
    (ROOT / "tests" / "fixtures" / "thirdparty").rglob("*.py")
)


@pytest.mark.parametrize("file", PLUGIN_FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_plugins_import_only_public_names_of_the_core(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "nanochat_core":
            assert node.module == "nanochat_core", f"line {node.lineno}"
            assert {name.name for name in node.names} <= set(nanochat_core.__all__), f"line {node.lineno}"
        if isinstance(node, ast.Import):
            assert not [n.name for n in node.names if n.name.split(".")[0] == "nanochat_core"], f"line {node.lineno}"


def test_public_names_are_there() -> None:
    for name in nanochat_core.__all__:
        assert getattr(nanochat_core, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = nanochat_core.nonsense  # type: ignore[attr-defined]


def test_tokenizers_and_data_sources_need_no_torch() -> None:
    plugins = load_plugins()
    ours = [*plugins["tokenizer"], *plugins["data_source"]]
    modules = sorted({entry.factory.partition(":")[0] for entry in ours if not entry.missing()})
    assert len(modules) > 5
    code = f"import sys, {', '.join(modules)}\nassert 'torch' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_finding_plugins_and_reading_experiments_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from nanochat_core.config.load import load\n"
        "from nanochat_core.plugins.discovery import load_plugins\n"
        f"load({str(ROOT / 'experiments' / 'quickstart.toml')!r}, (), load_plugins()).require_all()\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
