"""Discovery through entry points: isolation of what is broken, clashes, and what may be loaded."""

from __future__ import annotations

import re

import pytest
from helpers.install import install_fixture
from helpers.support import BROKEN, THIRD_PARTY, Site

import nanochat_core
from nanochat_core import PluginError
from nanochat_core.plugins import hookspecs
from nanochat_core.plugins.discovery import PluginFailure, Plugins, load_plugins
from nanochat_core.plugins.registry import KINDS


def offered(plugins: Plugins) -> set[tuple[str, str]]:
    return {(entry.kind, entry.name) for registry in plugins.registries.values() for entry in registry}


SHIPPED = {
    ("tokenizer", "bpe"), ("tokenizer", "bytes"), ("data_source", "parquet"), ("data_source", "python_docs"),
    ("model", "gpt"), ("optimizer", "adamw"), ("optimizer", "muon_adamw"), ("evaluator", "bpb"),
    ("evaluator", "samples"), ("logger", "console"), ("logger", "tensorboard"),
}  # fmt: skip
DEFAULTS = offered(load_plugins())


def failure_of(plugins: Plugins) -> PluginFailure:
    (failure,) = plugins.failures
    return failure


def test_the_default_plugins_are_found_like_any_other() -> None:
    plugins = load_plugins()
    assert offered(plugins) >= SHIPPED
    assert not plugins.failures
    assert {e.distribution for r in plugins.registries.values() for e in r if (e.kind, e.name) in SHIPPED} == {
        "nanochat-core"
    }
    assert plugins.versions()["nanochat-core"] == nanochat_core.__version__


def test_there_is_a_hook_for_each_kind() -> None:
    registering = {name for name in hookspecs.HOOKS if name.startswith("nanochat_register_")}
    assert registering == {f"nanochat_register_{kind}s" for kind in (*KINDS, "command")}
    assert len(hookspecs.OBSERVER_HOOKS) == 5
    assert set(hookspecs.HOOKS) == registering | set(hookspecs.OBSERVER_HOOKS)


def test_the_environment_restricts_what_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_PLUGINS", "bytes, adamw")
    assert offered(load_plugins()) == {("tokenizer", "bytes"), ("optimizer", "adamw")}
    monkeypatch.setenv("NANOCHAT_PLUGINS", "bytes,adamwx")
    failure = failure_of(load_plugins())
    assert failure.plugin == "adamwx"
    assert "NANOCHAT_PLUGINS" in str(failure)


def test_third_party_packages_stand_beside_ours(site: Site) -> None:
    for package in THIRD_PARTY.iterdir():
        install_fixture(package, site.directory)
    plugins = load_plugins()
    assert offered(plugins) - DEFAULTS == {
        ("tokenizer", "chars"), ("data_source", "counting"), ("model", "gru"), ("optimizer", "sgd"),
        ("evaluator", "accuracy"), ("logger", "jsonlines"),
    }  # fmt: skip
    entry = plugins["model"].get("gru")
    assert entry is not None
    assert (entry.distribution, entry.version, entry.plugin) == ("nanochat-tiny-model", "0.1.0", "tiny_model")
    assert plugins.versions()["nanochat-tiny-model"] == "0.1.0"


@pytest.mark.parametrize(
    ("package", "reason"),
    [
        ("nanochat-broken-import", "surely_missing_module"),
        ("nanochat-broken-hook-name", "nanochat_register_modles.*did you mean.*nanochat_register_models"),
        ("nanochat-broken-hook-signature", "device"),
        ("nanochat-broken-reserved-field", "field 'plugin'.*rename"),
    ],
)
def test_a_broken_plugin_is_left_out_with_one_line_and_a_traceback(site: Site, package: str, reason: str) -> None:
    install_fixture(BROKEN / package, site.directory)
    plugins = load_plugins()
    assert offered(plugins) == DEFAULTS
    failure = failure_of(plugins)
    assert failure.distribution == package
    assert "\n" not in str(failure)
    assert re.search(reason, str(failure))
    assert "Traceback" in failure.traceback


def test_what_fails_later_loads_well(site: Site) -> None:
    install_fixture(BROKEN / "nanochat-broken-factory", site.directory)
    install_fixture(BROKEN / "nanochat-broken-requirement", site.directory)
    plugins = load_plugins()
    assert not plugins.failures
    raising, nowhere = plugins["model"].get("raising"), plugins["model"].get("nowhere")
    unequipped = plugins["logger"].get("unequipped")
    assert raising is not None
    assert nowhere is not None
    assert unequipped is not None
    raising.load()
    with pytest.raises(PluginError, match=r"(?s)model 'nowhere' of nanochat-broken-factory 0\.1\.0 .*bulid"):
        nowhere.load()
    assert unequipped.missing() == ["surely_missing_module"]


def test_a_name_that_two_distributions_claim_belongs_to_neither(site: Site) -> None:
    install_fixture(BROKEN / "nanochat-broken-name-clash", site.directory)
    models = load_plugins()["model"]
    assert models.get("gpt") is None
    assert models.clashes() == ["gpt"]
    explained = models.explain_clash("gpt")
    assert "nanochat-core 0.1.0 (plugin 'gpt')" in explained
    assert "nanochat-broken-name-clash 0.1.0 (plugin 'broken_name_clash')" in explained
    assert "NANOCHAT_PLUGINS" in explained


def test_a_clash_is_settled_by_naming_the_plugins_to_load(site: Site) -> None:
    install_fixture(BROKEN / "nanochat-broken-name-clash", site.directory)
    entry = load_plugins(only="gpt")["model"].get("gpt")
    assert entry is not None
    assert entry.distribution == "nanochat-core"


REGISTER = """
@hookimpl
def nanochat_register_loggers(registry):
    registry.add("mine", config=Config, factory="x:y")
"""


def test_an_entry_point_may_be_called_like_another_packages(site: Site) -> None:
    """Names of entry points are labels: only names of entries must be unique."""
    site.add("gpt-extras", REGISTER, point="gpt")
    plugins = load_plugins()
    assert not plugins.failures
    assert offered(plugins) == DEFAULTS | {("logger", "mine")}


def test_a_failing_plugin_takes_nothing_of_its_namesake_along(site: Site) -> None:
    site.add("gpt-extras", REGISTER + "\n@hookimpl\ndef nanochat_register_models(registry): 1 / 0\n", point="gpt")
    plugins = load_plugins()
    assert failure_of(plugins).distribution == "gpt-extras"
    assert offered(plugins) == DEFAULTS


@pytest.mark.parametrize(
    ("plugin", "reason"),
    [
        ("", "implements no nanochat hook: mark it with @hookimpl"),
        (REGISTER.replace("@hookimpl", ""), "'nanochat_register_loggers' is not marked with @hookimpl"),
        (REGISTER + "def nanochat_register_models(registry): pass\n", "'nanochat_register_models' is not marked"),
        (REGISTER.replace('"x:y"', '"x.y"'), 'must be "module:attribute"'),
        (REGISTER.replace("config=Config", "config=dict"), "must be an attrs class"),
        (REGISTER.replace("config=Config", 'config=Config, defaults={"every": 3}'), "defaults names 'every'"),
        (REGISTER.replace("config=Config", 'config=Config, aliases={"old": "new"}'), "alias 'old'.*'new'"),
        (REGISTER.replace("config=Config", "confg=Config"), "confg"),
        (REGISTER + "\nimport sys\nsys.exit(3)\n", "SystemExit"),
        (REGISTER + "\nraise KeyError('multi\\nline')\n", "KeyError"),
    ],
)
def test_mistakes_of_plugin_authors(site: Site, plugin: str, reason: str) -> None:
    site.add("made-up", plugin)
    plugins = load_plugins()
    assert offered(plugins) == DEFAULTS
    assert re.search(reason, str(failure_of(plugins)))
    assert "\n" not in str(failure_of(plugins))


def test_required_modules_may_be_dotted(site: Site) -> None:
    requires = 'requires=["surely_missing.part", "os.path", "json"], config=Config'
    site.add("made-up", REGISTER.replace("config=Config", requires))
    entry = load_plugins()["logger"].get("mine")
    assert entry is not None
    assert entry.missing() == ["surely_missing.part"]
    assert entry.how_to_install() == "pip install surely_missing.part"
