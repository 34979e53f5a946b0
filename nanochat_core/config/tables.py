"""An experiment as tables of TOML, and comparing experiments option by option."""

from __future__ import annotations

from typing import Any

import attrs
import tomli_w

from nanochat_core.config.schema import TABLES, Experiment
from nanochat_core.plugins.choice import Choice
from nanochat_core.plugins.options import OnResume
from nanochat_core.plugins.structure import fields_of, to_plain


def to_tables(experiment: Experiment) -> dict[str, Any]:
    """The experiment as nested plain data, in the layout of a TOML file."""
    tables: dict[str, Any] = {}
    for table in TABLES:
        part = getattr(experiment, table)
        if isinstance(part, tuple):
            tables[table] = [choice_table(choice) for choice in part]
        else:
            tables[table] = choice_table(part) if isinstance(part, Choice) else to_plain(part)
    return {name: content for name, content in tables.items() if content}


def choice_table(choice: Choice) -> dict[str, Any]:
    keys = to_plain(choice.keys)
    if keys.get("name") == keys["plugin"]:
        del keys["name"]
    return {**keys, **to_plain(choice.config)}


def dump(experiment: Experiment) -> str:
    """TOML that loads again to the same experiment."""
    return tomli_w.dumps(to_tables(experiment))


def resume_rule(table: str, key: str, field: attrs.Attribute[Any] | None) -> OnResume:
    """What happens when a run is resumed with another value of an option: that of its field, else of its table."""
    rules: dict[str, OnResume] = {"tokenizer": "refuse", "data": "refuse", "model": "refuse", "optimizer": "warn"}
    if key == "plugin" and table in rules:
        return "refuse"  # a checkpoint holds one plugin's state
    return (field.metadata.get("on_resume") if field is not None else None) or rules.get(table, "free")


def changed_options(old: Experiment, new: Experiment) -> list[tuple[str, Any, Any, str]]:
    """Options that differ: (dotted key, old value, new value, the option's ``on_resume`` rule)."""
    changes: list[tuple[str, Any, Any, str]] = []
    for table in TABLES:
        a, b = getattr(old, table), getattr(new, table)
        if isinstance(a, tuple):
            continue  # evaluators and loggers may change freely
        plain_a, plain_b = (choice_table(x) if isinstance(x, Choice) else to_plain(x) for x in (a, b))
        config: Any = a.config if isinstance(a, Choice) else a
        fields = fields_of(type(config)) if attrs.has(type(config)) else {}
        if isinstance(a, Choice):
            fields |= fields_of(type(a.keys))
        keys = plain_a.keys() | plain_b.keys()
        if plain_a.get("plugin") != plain_b.get("plugin"):  # their options can't be compared
            keys &= fields_of(type(a.keys)).keys()
        for key in sorted(keys, key=lambda key: (key != "plugin", key)):
            if plain_a.get(key) != plain_b.get(key):
                rule = resume_rule(table, key, fields.get(key))
                changes.append((f"{table}.{key}", plain_a.get(key), plain_b.get(key), rule))
    return changes


def unverified_options(experiment: Experiment) -> dict[str, str]:
    """Options whose value differs from the default and whose code was never run on the hardware it is for: dotted key
    to what is unverified. Call it before "auto" values are resolved."""
    found = {}
    for table in TABLES:
        part = getattr(experiment, table)
        for content in part if isinstance(part, tuple) else (part,):
            prefix = f"{table}.{content.name}" if isinstance(part, tuple) else table
            configs = (content.keys, content.config) if isinstance(content, Choice) else (content,)
            for config in filter(lambda c: attrs.has(type(c)), configs):
                for name, field in fields_of(type(config)).items():
                    note = field.metadata.get("unverified")
                    if note and getattr(config, name) != field.default:
                        found[f"{prefix}.{name}"] = note
    return found
