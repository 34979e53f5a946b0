"""A small experiment on bytes of Python's documentation, as TOML, for benchmarks that start runs. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def small_experiment(**tables: Mapping[str, Any]) -> str:
    """Content of the experiment file, without compilation. ``tables`` are added to it or replace its options."""
    experiment: dict[str, Mapping[str, Any]] = {
        "tokenizer": {"plugin": "bytes"},
        "data": {"plugin": "python_docs"},
        **tables,
        "model": {"plugin": "gpt", **tables.get("model", {})},
        "optimizer": {"plugin": "muon_adamw", **tables.get("optimizer", {})},
        "train": {"compile": False, **tables.get("train", {})},
    }
    lines = []
    for name, options in experiment.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in options.items())]
    return "\n".join(lines) + "\n"
