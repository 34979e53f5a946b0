"""The core's distribution under its name of today and its first one, beside the other project's package."""

from __future__ import annotations

import json
import tomllib
from contextlib import nullcontext
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from helpers.support import ROOT, Site, call

import nanochat_core
from nanochat_core import PluginError
from nanochat_core.plugins.discovery import load_plugins
from nanochat_core.plugins.distribution import NAME, check_core_version, current_name
from nanochat_core.runs.provenance import provenance

LOGGER = """
@hookimpl
def nanochat_register_loggers(registry):
    registry.add("mine", config=Config, factory="x:y")
"""


def install_metadata(site: Site, name: str, version: str, points: str) -> None:
    """What pip leaves of an installed package, without its code."""
    info = site.directory / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(points)


def install_this(site: Site, name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    points = [f"{point} = {target}" for point, target in project["entry-points"]["nanochat"].items()]
    script = "[console_scripts]\nnanochat = nanochat_core.cli:main\n"
    install_metadata(site, name, "0.1.0", "\n".join([script, "[nanochat]", *points]))


def test_the_name_and_the_version_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (project["name"], project["version"]) == (NAME, nanochat_core.__version__)


@pytest.mark.parametrize("points", ["", "[console_scripts]\nnanochat = nanochat.cli:main\n"])
def test_the_other_project_is_not_mistaken_for_this_one(site: Site, points: str) -> None:
    install_this(site, "nanochat-core")
    install_metadata(site, "nanochat", "0.1.2", points)
    plugins = load_plugins()
    assert not plugins.failures
    ours = plugins["model"].get("gpt")
    assert ours is not None
    assert (ours.distribution, ours.version) == ("nanochat-core", nanochat_core.__version__)
    assert "nanochat" not in plugins.versions()
    facts = provenance({}, plugins.versions(), {}, {})
    assert facts["packages"]["nanochat-core"] == nanochat_core.__version__
    assert "0.1.2" not in json.dumps(facts)
    checked = call("plugins", "--check")
    assert checked.code == 0
    assert "nanochat 0.1.2 is another project's package" in checked.err
    assert "another project" not in call("plugins").err


def test_a_plugin_of_the_other_project_keeps_its_name(site: Site) -> None:
    site.add("nanochat", LOGGER, "theirs")
    entry = load_plugins()["logger"].get("mine")
    assert entry is not None
    assert (entry.distribution, entry.version) == ("nanochat", "1.0")


def test_a_plugin_whose_metadata_are_lost_works(site: Site) -> None:
    site.add("made-up", LOGGER)
    (site.directory / "made_up-1.0.dist-info" / "METADATA").unlink()
    entry = load_plugins()["logger"].get("mine")
    assert entry is not None
    assert (entry.distribution, entry.version) == ("unknown", "unknown")
    assert call("plugins", "--check").code == 0


def test_an_installation_under_the_first_name_is_this_one(site: Site) -> None:
    """As it is in a clone that was installed before the name changed: everything stands twice."""
    install_this(site, "nanochat-core")
    install_this(site, "nanochat")
    plugins = load_plugins()
    assert not plugins.failures
    assert not [clash for registry in plugins.registries.values() for clash in registry.clashes()]
    assert plugins.versions() == {"nanochat-core": nanochat_core.__version__}
    checked = call("plugins", "--check")
    assert checked.code == 0
    assert "pip uninstall nanochat, then install nanochat-core again" in checked.err


@pytest.mark.parametrize("name", ["nanochat", "nanochat-core", "Nanochat_Core"])
@pytest.mark.parametrize(
    ("ranges", "fits"),
    [
        ("", True), (">=0.1", True), (">=0.1,<0.2", True), ("==0.1.*", True), ("~=0.1.0", True),
        ("[hf]>=0.1; python_version>'3'", True), (">=9; python_version<'3'", True), (">=9; extra=='test'", True),
        (">=0.2", False), ("<0.1", False), ("!=0.1.0", False), ("[hf]==0.2.*", False),
    ],
)  # fmt: skip
def test_a_plugin_package_says_which_core_fits(tmp_path: Path, name: str, ranges: str, fits: bool) -> None:
    (tmp_path / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\nRequires-Dist: numpy\nRequires-Dist: {name}{ranges}\n"
    )
    with nullcontext() if fits else pytest.raises(PluginError, match=r"this is 0\.1\.0: pip install 'nanochat-core"):
        check_core_version(Distribution.at(tmp_path))


OUTDATED = "made-up 1.0 requires 'nanochat<1,>=0.1', which on the package index is another project's package"


@pytest.mark.parametrize("installed", ["from its source", "from its source that has gone", "from an index"])
def test_an_older_scaffold_is_explained(site: Site, installed: str) -> None:
    source = site.add("made-up", LOGGER, requires=["numpy", "nanochat>=0.1,<1"])
    pyproject = source / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace('"nanochat>', '\n  "nanochat>'))
    if installed != "from an index":
        url = json.dumps({"url": source.as_uri(), "dir_info": {"editable": True}})
        (site.directory / "made_up-1.0.dist-info" / "direct_url.json").write_text(url)
    if installed == "from its source that has gone":
        pyproject.unlink()
    checked = call("plugins", "--check")
    assert checked.code == 1
    assert ["logger", "mine", "made-up", "1.0"] in [line.split() for line in checked.out.splitlines()]  # it works
    assert OUTDATED in checked.err
    assert "called nanochat-core now" in checked.err
    if installed == "from its source":
        assert f'Write "nanochat-core<1,>=0.1" in {pyproject}:5 and install {source} again' in checked.err
        assert '"nanochat>=0.1,<1"' in pyproject.read_text().splitlines()[4]
    else:
        assert 'Write "nanochat-core<1,>=0.1" under dependencies in its pyproject.toml' in checked.err
    assert call("plugins").code == 0


def test_names_that_checkpoints_recorded() -> None:
    assert current_name("nanochat") == current_name("nanochat-core") == "nanochat-core"
    assert current_name("nanochat-tiny-model") == "nanochat-tiny-model"


def test_a_run_of_0_1_0_needs_nothing_else(tmp_path: Path) -> None:
    """Its checkpoint names nanochat 0.1.0, which is this distribution."""
    from nanochat_core.runs.restore import missing_distributions

    (checkpoint,) = (ROOT / "tests" / "fixtures" / "run_of_0_1_0").glob("*/checkpoints/step_*")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["plugins"] == {"nanochat": "0.1.0"}
    assert missing_distributions(checkpoint) == []
    manifest["plugins"]["surely-missing"] = "2"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (line,) = missing_distributions(tmp_path)
    assert line.endswith("pip install surely-missing==2")
