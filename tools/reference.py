"""Writes docs/reference/: every command and every option, from the code.

    python tools/reference.py            writes the pages
    python tools/reference.py --check    exits with 1 when a page differs from what the code says

The pages depend on the code alone: they are built from argparse's actions and from config classes, not from printed
help, and hold only the plugins of this repository.
"""

from __future__ import annotations

import argparse
import html
import importlib
import json
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from nanochat_core.cli import COMMANDS
from nanochat_core.config.schema import CORE_TABLES, TABLES
from nanochat_core.config.tables import resume_rule
from nanochat_core.plugins.choice import PLUGIN_LISTS, PLUGIN_TABLES, RESERVED, EntryKeys
from nanochat_core.plugins.discovery import load_plugins
from nanochat_core.plugins.registry import Entry
from nanochat_core.plugins.structure import fields_of, type_name

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "reference"
GENERATED = "<!-- Written by tools/reference.py: change the code and run it again. -->"

COMMANDS_HEAD = f"""{GENERATED}
# Commands

Every command of nanochat with its arguments. `nanochat COMMAND --help` prints the same.
Plugins may add [commands of their own](../plugins/index.md#commands).

| command | purpose |
|---|---|
"""

OPTIONS_HEAD = f"""{GENERATED}
# Options

Every key of an experiment's TOML file: the tables of the core, the keys that the core adds to the tables of plugins,
and the options of the plugins that come with nanochat. [Experiments](../experiments.md) explains how files, `extends`
and `--set` work together. `nanochat plugins KIND/NAME` prints the options of any plugin that is installed, and
`nanochat show FILE` the values of an experiment with where each came from.

- **default**: "unset" means that the key has no value unless a file gives one. "required" means that a file must.
- **on resume**: what happens when a run is resumed with another value. `free`: it goes on with the new value. `warn`:
  it goes on and says so. `refuse`: the run is not resumed, because it would become another run.
- **unverified**: the code behind the option never ran on the hardware that it is for.

The tables, and the plugins that can be named in them:

"""
LONG = 40  # characters of a default that does not stand in the table


def cell(text: str) -> str:
    """Text that can stand in a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def code(text: str) -> str:
    """The same for code; a vertical bar in backticks would end the cell on some sites and not on others."""
    if "|" not in text:
        return f"`{text}`"
    return f"<code>{html.escape(text, quote=False).replace('|', '&#124;')}</code>"


# -------------------------------------------------------------------------------------------------------- commands


def commands_page() -> str:
    """The page of all commands."""
    table, sections = "", ""
    for name, summary in COMMANDS.items():
        parser = argparse.ArgumentParser(prog=f"nanochat {name}", description=f"{summary[0].upper()}{summary[1:]}.")
        importlib.import_module(f"nanochat_core.cli.{name.replace('-', '_')}").add_arguments(parser)
        table += f"| [`nanochat {name}`](#nanochat-{name}) | {cell(summary)} |\n"
        sections += command_section(parser, parser.description or "", "##")
    return COMMANDS_HEAD + table + sections


def command_section(parser: argparse.ArgumentParser, description: str, heading: str) -> str:
    """A section about a command, followed by those of its subcommands."""
    text = f"\n{heading} `{parser.prog}`\n\n{description}\n"
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    subcommands = [action for action in actions if isinstance(action, argparse._SubParsersAction)]
    arguments = [action for action in actions if action not in subcommands]
    if not subcommands:
        text += f"\n```\n{usage(parser, arguments)}\n```\n"
    if arguments:
        text += "\n| argument | meaning |\n|---|---|\n"
        text += "".join(f"| {code(' / '.join(forms(action)))} | {meaning(action)} |\n" for action in arguments)
    for action in subcommands:
        helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for name, subparser in action.choices.items():
            described = f"{helps[name][:1].upper()}{helps[name][1:]}."
            text += command_section(subparser, described, heading + "#")
    return text


def forms(action: argparse.Action) -> list[str]:
    """How an argument is written: ``["-w N", "--workers N"]``."""
    names = action.metavar if isinstance(action.metavar, tuple) else (action.metavar or action.dest.upper(),)
    value = " ".join(names)
    if not action.option_strings:
        return [value]
    if action.nargs == 0:
        return list(action.option_strings)
    return [f"{option} [{value}]" if action.nargs == "?" else f"{option} {value}" for option in action.option_strings]


def usage(parser: argparse.ArgumentParser, arguments: list[argparse.Action]) -> str:
    """How the command is called, in one line."""
    parts = [parser.prog]
    parts += [forms(action)[-1] for action in arguments if action.option_strings and action.required]
    if any(action.option_strings and not action.required for action in arguments):
        parts.append("[options]")
    shapes: Mapping[Any, str] = {"?": "[{}]", "*": "[{} ...]", "+": "{} ..."}
    for action in arguments:
        if not action.option_strings:
            parts.append(shapes.get(action.nargs, "{}").format(forms(action)[0]))
    return " ".join(parts)


def meaning(action: argparse.Action) -> str:
    text = cell((action.help or "") % {**vars(action), "prog": "nanochat"})
    return text + " (required)" * (action.required and bool(action.option_strings))


# --------------------------------------------------------------------------------------------------------- options


def options_page() -> str:
    """The page of all options."""
    entries = list(own_entries())
    kinds = {**PLUGIN_TABLES, **PLUGIN_LISTS}
    text, contents = "", ""
    for table in TABLES:
        title = f"[[{table}]]" if table in PLUGIN_LISTS else f"[{table}]"
        contents += f"- [`{title}`](#{table})"
        text += f"\n## `{title}`\n"
        if table in CORE_TABLES:
            text += "\n" + options_table(table, CORE_TABLES[table])
            contents += "\n"
            continue
        kind = kinds[table]
        mine = [entry for entry in entries if entry.kind == kind]
        contents += ": " + ", ".join(f"[`{e.name}`](#{anchor(heading(e))})" for e in mine) + "\n"
        text += f"\nThe key `plugin` picks the {kind.replace('_', ' ')}. "
        text += "These keys belong to the core, whichever plugin it is:\n\n"
        text += options_table(table, RESERVED.get(kind, EntryKeys))
        for entry in mine:
            text += entry_section(table, entry)
    return OPTIONS_HEAD + contents + text


def own_entries() -> Iterator[Entry]:
    """What this repository's plugins offer, by kind and name. Ends the program when one of them does not load."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]["nanochat"]
    packages = {module.split(".")[0] for module in points.values()}
    plugins = load_plugins(only=",".join(points))
    for failure in plugins.failures:
        sys.exit(f"{failure}\n{failure.traceback}")  # its options would be missing
    for registry in plugins.registries.values():
        yield from (entry for entry in registry if entry.factory.split(".")[0] in packages)


def heading(entry: Entry) -> str:
    return f"{entry.kind}/{entry.name}"


def anchor(title: str) -> str:
    """The anchor that GitHub and MkDocs give a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def entry_section(table: str, entry: Entry) -> str:
    text = f"\n### `{heading(entry)}`\n\n{cell(entry.summary[:1].upper() + entry.summary[1:])}.\n"
    if entry.requires:
        text += f"\nIt needs {' and '.join(f'`{module}`' for module in entry.requires)}.\n"
    if fields_of(entry.config):
        text += "\n" + options_table(table, entry.config)
    else:
        text += "\nIt has no options.\n"
    fields = fields_of(RESERVED.get(entry.kind, EntryKeys))
    changed = [f"`{name} = {default(fields[name], value)}`" for name, value in entry.defaults.items()]
    if changed:
        text += f"\nIts own defaults of the keys above: {', '.join(changed)}.\n"
    for old, new in entry.aliases.items():
        text += f"\n`{old}` is another name of `{new}`.\n"
    return text


def options_table(table: str, config: type) -> str:
    """A row per option of a config class, and what is too long for a row."""
    lines, below = ["| option | type | default | meaning | on resume |", "|---|---|---|---|---|"], ""
    for name, field in fields_of(config).items():
        note = field.metadata.get("unverified")
        help_text = cell(field.metadata.get("help", "")) + (f" **Unverified**: {cell(note)}." if note else "")
        kind = cell(type_name(field.type))
        shown = default(field, field.default)
        if len(shown) > LONG:
            below += f"\nThe default of `{name}`:\n\n```toml\n{name} = {shown}\n```\n"
            shown = "below"
        shown = shown if shown in ("required", "unset", "below") else code(shown)
        lines.append(f"| `{name}` | {kind} | {shown} | {help_text} | {resume_rule(table, name, field)} |")
    return "\n".join(lines) + "\n" + below


def default(field: attrs.Attribute[Any], value: Any) -> str:
    """A default as a TOML file would give it."""
    if value is attrs.NOTHING:
        return "required"
    return "unset" if value is None else json.dumps(value, default=str, ensure_ascii=False)


# ------------------------------------------------------------------------------------------------------------ main


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the reference of commands and options.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when a page is stale")
    options = parser.parse_args(argv)
    stale = []
    for name, text in {"commands.md": commands_page(), "options.md": options_page()}.items():
        page = PAGES / name
        if page.exists() and page.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not options.check:
            page.parent.mkdir(exist_ok=True)
            page.write_text(text, encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}")
    if options.check and stale:
        print(f"docs/reference/ is stale ({', '.join(stale)}): run python tools/reference.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
