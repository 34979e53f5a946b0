"""``nanochat show FILE``: print every resolved value and its origin."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from nanochat_core.cli import add_experiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_experiment(parser)


def main(options: argparse.Namespace, _: Sequence[str]) -> int:
    from nanochat_core.config.load import load
    from nanochat_core.config.schema import TABLES
    from nanochat_core.config.tables import to_tables, unverified_options
    from nanochat_core.plugins.discovery import load_plugins

    loaded = load(options.file, options.overrides, load_plugins())
    experiment, origins, problems = loaded.experiment, loaded.origins, loaded.missing[:0]
    blocking = [p for p in loaded.missing if not p.key.startswith(("data", "loggers", "evaluators"))]
    if not blocking:  # formulas need only the model, the optimizer and the tokenizer
        from nanochat_core.hardware.machine import pick_device
        from nanochat_core.planning.planner import make_plan

        planned = make_plan(loaded, 1, pick_device(0), measure=False)
        experiment, origins, problems = planned.experiment, dict(planned.origins), planned.problems
    values = dict(_leaves(to_tables(experiment)))
    rows = [(key, f"{key} = {_toml(value)}", origins[key].text) for key, value in values.items() if key in origins]
    rows += [(key, f"{key} (unset)", origins[key].text) for key in origins if key not in values]
    order = {table: index for index, table in enumerate(TABLES)}
    notes = {key: f" (unverified: {note})" for key, note in unverified_options(loaded.experiment).items()}
    rows.sort(key=lambda row: order[row[0].split(".")[0]])  # stable sort: unset options come last in their table
    width = max(len(text) for _, text, _ in rows if len(text) < 80)
    table = ""
    for key, text, origin in rows:
        if key.split(".")[0] != table:
            if table:
                print()
            table = key.split(".")[0]
        print(_printable(f"{text:<{width}}  # {origin}{notes.get(key, '')}"))
    for problem in problems:
        print(f"\ncan't run here: {problem}", file=sys.stderr)
    for problem in loaded.missing:
        print(f"\nmissing: {problem}", file=sys.stderr)
    return 0


def _leaves(tables: Mapping[str, Any]) -> list[tuple[str, Any]]:
    leaves = []
    for table, content in tables.items():
        if isinstance(content, list):
            content = {entry.get("name", entry["plugin"]): entry for entry in content}
            for name, entry in content.items():
                leaves += [(f"{table}.{name}.{key}", value) for key, value in ({"name": name} | entry).items()]
        else:
            leaves += [(f"{table}.{key}", value) for key, value in content.items()]
    return leaves


def _toml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)  # str: dates of a plugin that is not installed


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)
