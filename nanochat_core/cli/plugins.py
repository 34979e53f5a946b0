"""``nanochat plugins``: list and describe installed plugins, or create a plugin package."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import attrs

from nanochat_core.cli.console import table
from nanochat_core.errors import PluginError, did_you_mean
from nanochat_core.plugins.choice import RESERVED, EntryKeys
from nanochat_core.plugins.discovery import Plugins, load_plugins
from nanochat_core.plugins.distribution import installed_by_first_name, outdated_requirements
from nanochat_core.plugins.registry import KINDS, Entry
from nanochat_core.plugins.structure import fields_of, type_name

SLOW_SECONDS = 0.2  # an import of a plugin that takes longer is reported as slow


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        nargs="*",
        metavar="KIND[/NAME] | new KIND NAME [DIR]",
        help=f"list one kind ({', '.join(KINDS)}), describe one entry of it, or create a new plugin package",
    )
    parser.add_argument("--timings", action="store_true", help="show how long each plugin takes to import")
    parser.add_argument(
        "--check",
        action="store_true",
        help="show why plugins failed to load or need an update; exit code 1 if any did",
    )


def main(options: argparse.Namespace, _: Sequence[str]) -> int:
    if options.what[:1] == ["new"]:
        return _new(options.what[1:])
    if len(options.what) > 1:
        raise PluginError(f"give one kind or entry at a time, not {' '.join(options.what)}")
    plugins = load_plugins()
    kind, _slash, name = "".join(options.what).partition("/")
    kind = _kind(kind) if kind else ""
    if options.timings:
        _timings(plugins)
    elif name:
        _explain(plugins, kind, name)
    else:
        _list(plugins, kind)
    for registry in plugins.registries.values():
        for clash in registry.clashes():
            print(registry.explain_clash(clash), file=sys.stderr)
    for failure in plugins.failures:
        print(failure if not options.check else f"{failure}\n{failure.traceback}", file=sys.stderr)
    if not options.check:
        return 0
    clashes = any(r.clashes() for r in plugins.registries.values())
    outdated = outdated_requirements()
    for line in filter(None, [*outdated, installed_by_first_name()]):
        print(line, file=sys.stderr)
    return 1 if plugins.failures or clashes or outdated else 0


def _kind(text: str) -> str:
    kind = text.replace("-", "_").removesuffix("s")
    if kind not in KINDS:
        hint = did_you_mean(kind, KINDS) or f" (kinds: {', '.join(KINDS)})"
        raise PluginError(f"there is no kind of plugin {text!r}{hint}")
    return kind


def _new(arguments: Sequence[str]) -> int:
    """Run ``nanochat plugins new KIND NAME [DIR]``: create the package of a new plugin."""
    from nanochat_core.plugins.scaffold import write_package

    if len(arguments) not in (2, 3):
        raise PluginError("usage: nanochat plugins new KIND NAME [DIR], as in: nanochat plugins new evaluator top-k")
    directory = write_package(_kind(arguments[0]), arguments[1], Path(arguments[2]) if arguments[2:] else None)
    print(
        f"created {directory}. Next:\n  pip install -e {directory}\n  pytest {directory}\n  less {directory}/README.md"
    )
    return 0


def _timings(plugins: Plugins) -> None:
    """Print the seconds that each plugin took to import, slowest first. Every command spends this time."""
    rows = [("SECONDS", "PLUGIN")]
    for loaded in sorted(plugins.loaded, key=lambda p: -p.seconds):
        slow = (
            "  slow: move imports of large libraries to the module of the factory"
            if loaded.seconds > SLOW_SECONDS
            else ""
        )
        rows.append((f"{loaded.seconds:.3f}", f"{loaded.plugin} of {loaded.distribution} {loaded.version}{slow}"))
    print(table(rows, "rl"))


def _list(plugins: Plugins, only: str) -> None:
    entries = [e for kind in KINDS if kind == only or not only for e in plugins[kind]]
    rows = [("KIND", "NAME", "DISTRIBUTION", "VERSION", "SUMMARY")]
    for entry in entries:
        note = f" [{_needs(entry)}]" if entry.missing() else ""
        rows.append((entry.kind, entry.name, entry.distribution, entry.version, entry.summary + note))
    print(table(rows, "lllll"))


def _explain(plugins: Plugins, kind: str, name: str) -> None:
    registry = plugins[kind]  # type: ignore[index]
    entry: Entry | None = registry.get(name)
    if entry is None:
        if registry.claims(name):
            raise PluginError(registry.explain_clash(name))
        raise PluginError(f"no {kind} {name!r} is installed{registry.suggest(name)}{plugins.explain_failure(name)}")
    print(f"{kind} {name}: {entry.summary}\nof {entry.distribution} {entry.version}, factory {entry.factory}")
    if entry.missing():
        print(_needs(entry))
    print("\noptions:")
    for field in fields_of(entry.config).values():
        _print_option(field, field.default)
    reserved = {n: f for n, f in fields_of(RESERVED.get(kind, EntryKeys)).items() if n not in ("plugin", "name")}
    if reserved:
        print(f"\noptions that every {kind.replace('_', ' ')} has:")
    for option_name, field in reserved.items():
        _print_option(field, entry.defaults.get(option_name, field.default))
    for old, new in entry.aliases.items():
        print(f"  {old}: another name of {new}")


def _needs(entry: Entry) -> str:
    return f"needs {', '.join(entry.missing())}: {entry.how_to_install()}"


def _print_option(field: attrs.Attribute[object], default: object) -> None:
    if default is attrs.NOTHING:
        shown = "required"
    elif default is None:
        shown = "unset by default"
    else:
        shown = f"default {json.dumps(default, default=str, ensure_ascii=False)}"
    print(f"  {field.name} ({type_name(field.type)}, {shown})")
    if field.metadata.get("help"):
        print(f"      {field.metadata['help']}")
    if field.metadata.get("unverified"):
        print(f"      unverified: {field.metadata['unverified']}")
