"""Every number that an experiment may hold has bounds, so that nothing overflows or takes for ever."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator
from typing import Any, Union, get_args, get_origin

import attrs
import pytest

from nanochat_core.config.schema import CORE_TABLES
from nanochat_core.plugins.choice import RESERVED
from nanochat_core.plugins.discovery import load_plugins
from nanochat_core.plugins.distribution import NAME
from nanochat_core.plugins.registry import KINDS
from nanochat_core.plugins.structure import Mismatch, converter, fields_of

# Options of which a value without bounds is meant, with the reason.
UNBOUNDED = {"train.stall_warning": "inf is off"}


def _parts(tp: Any) -> Iterator[Any]:
    """The plain types that values of a type consist of."""
    if get_origin(tp) in (Union, types.UnionType, tuple):
        for part in get_args(tp):
            yield from _parts(part)
    else:
        yield tp


def _numbers(table: str, config: type) -> Iterator[tuple[str, Any, type]]:
    for name, field in fields_of(config).items():
        for part in _parts(field.type):
            if part in (int, float):
                yield f"{table}.{name}", field, part
            elif attrs.has(part):
                yield from _numbers(f"{table}.{name}", part)


def _options() -> list[Any]:
    tables = [*CORE_TABLES.items(), *RESERVED.items()]
    plugins = load_plugins()
    tables += [(f"{kind}/{e.name}", e.config) for kind in KINDS for e in plugins[kind] if e.distribution == NAME]
    return [pytest.param(*found, id=found[0]) for table, config in tables for found in _numbers(table, config)]


def _refuses(field: Any, value: Any) -> bool:
    given = [value] if get_origin(field.type) is tuple else value
    try:
        structured = converter.structure(given, field.type)
        if field.validator is not None:
            field.validator(None, field, structured)
    except (Mismatch, ValueError) as error:
        message = str(error)
        return message.isprintable() and len(message) < 300
    return False


@pytest.mark.parametrize(("key", "field", "number"), _options())
def test_every_number_has_bounds(key: str, field: Any, number: type) -> None:
    far: list[Any] = [math.nan, -math.inf, -(10**30), -(2**62)]
    if key not in UNBOUNDED:
        far += [math.inf, 10**30, 1e30] + [2**62] * (number is int and not key.endswith("seed"))
    assert [value for value in far if not _refuses(field, value)] == []


@pytest.mark.parametrize(("key", "field", "number"), _options())
def test_the_default_is_within_them(key: str, field: Any, number: type) -> None:
    if field.default is not attrs.NOTHING and field.default is not None:
        field.validator(None, field, field.default)
