"""The guides: generated pages are fresh, links lead somewhere, and what is named is there."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from helpers.support import ROOT

CORE, DOCS = ROOT / "nanochat_core", ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), ROOT / "benchmarks" / "README.md", *sorted(DOCS.rglob("*.md"))]
ROOMS = sorted(path.parent for path in CORE.glob("*/__init__.py"))
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(r"`((?:nanochat_core|plugins|tests|benchmarks|experiments|tools|docs)/[\w./-]+)`")
TESTS = re.compile(r"`(tests/[\w/]+\.py)`((?:[:,] `\w+`(?: \(slow\))?)+)")


def names(page: Path) -> str:
    return str(page.relative_to(ROOT))


def load_reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "tools" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REFERENCE = load_reference()


def prose(page: Path) -> str:
    """A page without what stands in code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    found: set[str] = set()
    for title in re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE):
        anchor = REFERENCE.anchor(title.replace("`", ""))
        found.add(anchor if anchor not in found else f"{anchor}-1")
    return found


# ------------------------------------------------------------------------------------------------- generated pages


def test_the_reference_is_what_the_code_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert REFERENCE.main(["--check"]) == 0, capsys.readouterr().err


def test_the_reference_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    before = REFERENCE.commands_page()
    monkeypatch.setenv("COLUMNS", "40")
    assert REFERENCE.commands_page() == before


def test_a_stale_reference_is_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(REFERENCE, "PAGES", tmp_path)
    (tmp_path / "commands.md").write_text("# Commands of last year\n")
    assert REFERENCE.main(["--check"]) == 1
    assert "commands.md, options.md" in capsys.readouterr().err
    assert (tmp_path / "commands.md").read_text() == "# Commands of last year\n"


def test_the_reference_explains_an_option() -> None:
    text = REFERENCE.options_page()
    (row,) = re.findall(r"^\| `device_batch_size` .*$", text, re.MULTILINE)
    assert row.startswith('| `device_batch_size` | int or "auto" | `32` | ')
    assert row.endswith(" | free |")
    assert re.search(r"^\| `profile` .* \*\*Unverified\*\*: ", text, re.MULTILINE)


# ----------------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for link in LINK.findall(prose(page)):
        if re.match(r"\w+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append(link)
    assert wrong == []


def test_every_page_is_on_the_site() -> None:
    site = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), yaml.BaseLoader)

    def leaves(tree: object) -> Iterator[str]:
        if isinstance(tree, str):
            yield tree
        for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
            yield from leaves(child)

    outside = {"index.md", "changelog.md", "contributing.md", "benchmarks.md"}  # see tools/mkdocs_hooks.py
    assert set(leaves(site["nav"])) == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} | outside


# ------------------------------------------------------------------------------------------------ what pages name


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_paths_in_the_text_are_there(page: Path) -> None:
    """The tutorials name files of the packages that they write, too; the design names rooms, one of them plugins/."""
    named = [path for path in PATH.findall(prose(page)) if "NAME" not in path]
    ours = [path for path in named if not (page.parent.name == "plugins" and path.startswith("tests/test_"))]
    assert [path for path in ours if not (ROOT / path).exists() and not (CORE / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_tests_in_the_text_are_there(page: Path) -> None:
    for file, keywords in TESTS.findall(prose(page)):
        functions = re.findall(r"^def (test_\w+)", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
        for keyword in re.findall(r"`(\w+)`", keywords):
            assert any(keyword in function for function in functions), f"{file}: {keyword}"


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_the_design_names_every_module(room: Path) -> None:
    text = (DOCS / "design.md").read_text(encoding="utf-8")
    section = text.split(f"### `{room.name}/`\n", 1)[1].split("\n#", 1)[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    named = {name.rstrip("/") for row in rows for name in re.findall(r"`([\w/]+)`", row)}
    there = {path.stem for path in room.glob("*.py")} | {path.parent.name for path in room.glob("*/__init__.py")}
    assert named == there - {"__init__"}


def test_the_walks_name_modules_that_are_there() -> None:
    text = (DOCS / "design.md").read_text(encoding="utf-8")
    walks = text.split("## What happens in", 1)[1].split("## Where is", 1)[0]
    named = re.findall(r"`(\w+/\w+\.py)`", walks)  # those of rooms; other paths have another test
    assert len(named) > 30
    assert [path for path in named if not (CORE / path).exists()] == []


def test_the_readme_names_every_room_plugin_and_extra() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    plugins = [file.parent for file in ROOT.glob("plugins/*/plugin.py")]
    assert [folder.name for folder in [*ROOMS, *plugins] if f"\n  {folder.name}/ " not in text] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE)) == set(project["optional-dependencies"])
