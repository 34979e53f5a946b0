"""Strict structuring of config classes by cattrs: nothing is coerced, and every problem is found at once."""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import attrs
import cattrs

from nanochat_core.errors import PluginError, did_you_mean, mask_credentials
from nanochat_core.files import expand_path
from nanochat_core.plugins.choice import RESERVED, EntryKeys
from nanochat_core.plugins.options import shown

INTEGERS = range(-(2**63), 2**63)  # those that every reader of TOML can hold


class Mismatch(ValueError):
    """A value that does not fit its type, or a table with several such values: (key path, message) pairs."""

    def __init__(self, problems: list[tuple[tuple[str, ...], str]]) -> None:
        self.problems = problems
        super().__init__("; ".join(f"{'.'.join(path)}: {text}" if path else text for path, text in problems))


def type_name(tp: Any) -> str:
    """A type in a user's words: ``int``, ``"auto" or int``, ``list of str``."""
    if tp is type(None):
        return "nothing"
    if tp is Path:
        return "path"
    origin, args = get_origin(tp), get_args(tp)
    if origin is Literal:
        return " or ".join(f'"{a}"' if isinstance(a, str) else str(a) for a in args)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(a) for a in args if a is not type(None))
    if origin in (tuple, list):
        return f"list of {type_name(args[0])}"
    return getattr(tp, "__name__", str(tp))


def _strict(tp: Any) -> Callable[[Any, Any], Any]:
    """Hook for one plain type: no coercion, except that a float accepts whole numbers."""

    def structure(value: Any, _: Any) -> Any:
        if tp is float and isinstance(value, int) and not isinstance(value, bool):
            value = _as_float(value)
        if tp is Path and isinstance(value, str):
            return _as_path(value)
        if not isinstance(value, tp) or (tp is not bool and isinstance(value, bool)):
            raise Mismatch([((), f"must be {type_name(tp)}, not {shown(value)}")])
        if tp is int and value not in INTEGERS:
            raise Mismatch([((), f"must be an integer of 64 bits, not {shown(value)}")])
        if tp is str and not _is_unicode(value):
            raise Mismatch([((), f"must be valid Unicode, which TOML can hold, not {shown(value)}")])
        return value

    return structure


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        raise Mismatch([((), f"must be a number that a float can hold, not {shown(value)}")]) from None


def _as_path(value: str) -> Path:
    try:
        return expand_path(value)
    except ValueError as error:
        raise Mismatch([((), str(error))]) from None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _union_hook(tp: Any) -> Callable[[Any, Any], Any]:
    members = [member for member in get_args(tp) if member is not type(None)]

    def structure(value: Any, _: Any) -> Any:
        if value is None and type(None) in get_args(tp):  # from a checkpoint; TOML has no None
            return None
        if len(members) == 1:
            return converter.structure(value, members[0])
        for member in members:
            try:
                return converter.structure(value, member)
            except Mismatch:
                if member is str and isinstance(value, str):  # a text, but not one that may be: say what is wrong
                    raise
        raise Mismatch([((), f"must be {type_name(tp)}, not {shown(value)}")])

    return structure


def _literal_hook(tp: Any) -> Callable[[Any, Any], Any]:
    def structure(value: Any, _: Any) -> Any:
        for allowed in get_args(tp):
            if value == allowed and type(value) is type(allowed):
                return value
        raise Mismatch([((), f"must be {type_name(tp)}, not {shown(value)}")])

    return structure


def _list_hook(tp: Any) -> Callable[[Any, Any], Any]:
    def structure(value: Any, _: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise Mismatch([((), f"must be a {type_name(tp)}, not {shown(value)}")])
        return tuple(converter.structure(item, get_args(tp)[0]) for item in value)

    return structure


def _attrs_hook(cls: Any) -> Callable[[Any, Any], Any]:
    fields = _typed_fields(cls)

    def structure(table: Any, _: Any) -> Any:
        if not isinstance(table, Mapping):
            raise Mismatch([((), f"must be a table, not {shown(table)}")])
        problems: list[tuple[tuple[str, ...], str]] = []
        for key in table:
            if key not in fields:
                problems.append(((key,), f"unknown key{did_you_mean(key, fields)}"))
        values = {}
        for name, field in fields.items():
            if name in table:
                try:
                    values[name] = converter.structure(table[name], field.type)
                except Mismatch as error:
                    problems += [((name, *path), text) for path, text in error.problems]
                    continue
                if field.validator is not None:
                    try:
                        field.validator(None, field, values[name])
                    except _BAD_VALUE as error:
                        problems.append(((name,), _reason(error)))
            elif field.default is attrs.NOTHING:
                problems.append(((name,), f"missing: give a value ({type_name(field.type)})"))
        if problems:
            raise Mismatch(problems)
        try:
            return cls(**values)  # runs __attrs_post_init__, where a class checks fields against each other
        except _BAD_VALUE as error:
            name, must, rest = _reason(error).partition(" must ")
            if name in fields:  # "depth must be even" is about that field
                raise Mismatch([((name,), f"{must.lstrip()}{rest}")]) from error
            raise Mismatch([((), _reason(error))]) from error

    return structure


# What a validator raises for a value that it refuses, or that it can't compute with or look up.
_BAD_VALUE = (ValueError, TypeError, ArithmeticError, OSError)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"can't be used: {error.strerror}"
    return str(error.args[0]) if isinstance(error, ValueError | TypeError) and error.args else str(error)


@functools.cache
def _typed_fields(cls: type) -> Mapping[str, Any]:
    """Fields of an attrs class by name, their types resolved."""
    hints = typing.get_type_hints(cls)
    return {f.name: f.evolve(type=hints[f.name]) for f in attrs.fields(cls) if f.init}


def _make_converter() -> cattrs.Converter:
    made = cattrs.Converter(forbid_extra_keys=True)
    for plain in (bool, int, float, str, Path):
        made.register_structure_hook(plain, _strict(plain))
    hooks: list[tuple[Callable[[Any], bool], Callable[[Any], Callable[[Any, Any], Any]]]] = [
        (lambda t: get_origin(t) in (Union, types.UnionType), _union_hook),
        (lambda t: get_origin(t) is Literal, _literal_hook),
        (lambda t: get_origin(t) is tuple, _list_hook),
        (attrs.has, _attrs_hook),
    ]
    for applies, make_hook in hooks:
        made.register_structure_hook_factory(applies, make_hook)
    return made


converter = _make_converter()


def fields_of(cls: type) -> dict[str, Any]:
    """Attributes of a config class by name: ``.type`` (resolved), ``.default``, ``.metadata["help"]``."""
    return dict(_typed_fields(cls))


def takes_text(tp: Any) -> bool:
    """Whether values of a type are text, and never numbers or booleans."""
    origin, args = get_origin(tp), get_args(tp)
    if origin in (Union, types.UnionType):
        return any(map(takes_text, args)) and not any(a in (bool, int, float) for a in args)
    return tp in (str, Path)


def to_plain(config: Any, keep_none: bool = False) -> dict[str, Any]:
    """Return a config as plain data for TOML or JSON: lists for tuples, str for paths.

    Credentials in addresses are masked: see ``mask_credentials``. Options that are None are left out unless
    ``keep_none``, because TOML has no None.
    """
    if isinstance(config, Mapping):
        return dict(config)

    def plain(value: Any) -> Any:
        if attrs.has(type(value)):
            return to_plain(value, keep_none)
        if isinstance(value, tuple | list):
            return [plain(v) for v in value]
        return mask_credentials(str(value)) if isinstance(value, Path | str) else value

    values = {f.name: getattr(config, f.name) for f in attrs.fields(type(config)) if f.init}
    return {name: plain(value) for name, value in values.items() if keep_none or value is not None}


_SIMPLE = (bool, int, float, str, Path, type(None))


def _typable(tp: Any) -> bool:
    origin, args = get_origin(tp), get_args(tp)
    if origin in (Union, types.UnionType):
        return all(_typable(a) for a in args)
    if origin is tuple:
        return len(args) == 2 and args[1] is Ellipsis and _typable(args[0])
    return tp in _SIMPLE or origin is Literal or attrs.has(tp)


def check_config_class(kind: str, name: str, config: type) -> None:
    """Refuse a config class that a TOML table can't fill.

    Raises:
        PluginError: names the class, the field, and a remedy.
    """
    where = f"config class {config!r} of {kind} {name!r}"
    if not (isinstance(config, type) and attrs.has(config)):
        raise PluginError(f"{where} must be an attrs class: decorate it with @attrs.frozen")
    try:
        fields = fields_of(config)
    except (NameError, KeyError) as error:
        raise PluginError(
            f"{where} has a field type that can't be resolved ({error}): import types at run time, "
            f"not under TYPE_CHECKING"
        ) from error
    reserved = set(fields_of(RESERVED.get(kind, EntryKeys))) | {"remove"}
    for field in fields.values():
        if field.name in reserved:
            raise PluginError(f"{where} may not have a field {field.name!r}: the core uses that key; rename it")
        if not _typable(field.type):
            raise PluginError(
                f"{where}: TOML can't fill field {field.name!r} of type {field.type}: use bool, int, float, str, Path, "
                f"Literal, X | None, tuple[X, ...] or a nested attrs class"
            )
