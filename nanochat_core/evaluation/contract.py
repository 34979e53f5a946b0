"""What an evaluator returned, as plain data that the ledger and the files of evaluations can hold, or why it is none.

This module imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from nanochat_core.evaluation.results import encode_files
from nanochat_core.files import shorten
from nanochat_core.interfaces.evaluator import Evaluation

LONGEST_NAME = 200  # characters of the name of a metric or text
_RESERVED = ("step", "time", "evaluator")


class BadResult(Exception):
    """Error: the result of an evaluator breaks a rule, which the message tells."""


def checked(evaluation: object) -> Evaluation:
    """Return the result of an evaluator as plain data, of which it keeps no reference.

    Raises:
        BadResult: with the first rule that the result breaks, after all of it was encoded as it will be written.
    """
    if not isinstance(evaluation, Evaluation):
        raise BadResult(f"evaluate() must return a nanochat_core.Evaluation, not {type(evaluation).__name__}")
    copy = _copy(evaluation)
    problems = list(_problems(copy))
    if problems:
        raise BadResult(problems[0])
    plain = attrs.evolve(
        copy,
        metrics={name: _number(value) for name, value in copy.metrics.items()},
        examples=[_with_floats(row) for row in copy.examples],
        facts=json.loads(json.dumps(copy.facts)),
        settings=json.loads(json.dumps(copy.settings)),
    )
    try:
        encode_files(plain)
    except Exception as error:  # pyarrow has exceptions of many types
        raise BadResult(f"examples or files can't be written: {error}") from error
    return plain


def reserved_problem(name: str, owners: Mapping[str, str], owner: str) -> str:
    """Return why the entry ``owner`` may not use a name in the ledger; empty if it may.

    Args:
        name: of a metric or text, as the ledger will have it.
        owners: entry by name, of the names that are in use.
    """
    if name in _RESERVED or name.startswith(("train/", "total_")):
        return f"{name} is reserved in the ledger for the core: rename the metric or text"
    if owners.get(name, owner) != owner:
        return (
            f"{name} is a metric or text of the entry {owners[name]!r} already: give one of the two entries a name of "
            f'its own, as in name = "mine"'
        )
    return ""


def _copy(evaluation: Evaluation) -> Evaluation:
    """Return a copy whose containers are dicts and lists. Raises BadResult when they are something else."""
    copies: dict[str, Any] = {}
    for field in ("metrics", "texts", "files", "facts", "settings", "examples", "notes"):
        value = getattr(evaluation, field)
        kind = Sequence if field in ("examples", "notes") else Mapping
        if not isinstance(value, kind) or isinstance(value, str | bytes):
            raise BadResult(f"{field} must be a {kind.__name__.lower()}, not {shorten(value)}")
        copies[field] = dict(value) if isinstance(value, Mapping) else list(value)
    copies["examples"] = [dict(row) if isinstance(row, Mapping) else row for row in copies["examples"]]
    return Evaluation(**copies)


def _problems(evaluation: Evaluation) -> Iterator[str]:
    for name, value in evaluation.metrics.items():
        yield from _name_problems("metric", name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            yield f"metric {shorten(name)} must be a Python int or float, not {type(value).__name__}: use .item()"
        elif not _fits(value):
            yield f"metric {shorten(name)} must be a number that fits a float"
        elif name in evaluation.texts:
            yield f"{shorten(name)} is both a metric and a text: rename one"
    for what in ("texts", "files"):
        for name, text in getattr(evaluation, what).items():
            yield from _name_problems(what[:-1], name)
            yield from _text_problems(f"{what[:-1]} {shorten(name)}", text)
    for note in evaluation.notes:
        yield from _text_problems("a note", note)
    for row in evaluation.examples:
        yield from _example_problems(row)
    for field in ("facts", "settings"):
        try:
            text = json.dumps(getattr(evaluation, field), ensure_ascii=False)
            text.encode()
            json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            yield f"{field} must be data that JSON can hold: {shorten(str(error), 200)}"
        if not all(isinstance(name, str) for name in getattr(evaluation, field)):
            yield f"names of {field} must be texts"


def _name_problems(what: str, name: object) -> Iterator[str]:
    if not isinstance(name, str):
        yield f"the name of a {what} must be a str, not {shorten(name)}"
    elif not name or name != name.strip() or not name.isprintable() or len(name) > LONGEST_NAME:
        yield (
            f"the name of the {what} {shorten(name)} must be 1 to {LONGEST_NAME} printable characters, without blanks "
            f"around them"
        )


def _text_problems(what: str, text: object) -> Iterator[str]:
    if not isinstance(text, str):
        yield f"{what} must be a str, not {type(text).__name__}"
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        yield f"{what} must be valid Unicode: {error.reason} (character {error.start})"


def _example_problems(row: object) -> Iterator[str]:
    if not isinstance(row, Mapping) or not all(isinstance(name, str) for name in row):
        yield f"an example must map names of columns to values, not {shorten(row)}"
    elif not {"task", "example", "value"} <= row.keys():
        yield f"an example needs task, example and value, but one has only {', '.join(row)}"
    else:
        for name in ("task", "example"):
            yield from _text_problems(f"{name} of an example", row[name])
        for name in ("value", "centered"):
            value = row.get(name, 0.0)
            if not isinstance(value, int | float) or not _fits(value):
                yield f"{name} of an example must be a number that fits a float, not {shorten(value)}"


def _fits(value: float) -> bool:
    try:
        float(value)
    except OverflowError:
        return False
    return True


def _number(value: float) -> float:
    """A number as a plain Python one; ints that other programs can't hold become floats."""
    if isinstance(value, int) and abs(value) < 2**63:
        return int(value)
    return float(value)


def _with_floats(row: Mapping[str, Any]) -> dict[str, Any]:
    """An example whose scores are floats, so that ints and bools among them make no column of another type."""
    return {name: float(value) if name in ("value", "centered") else value for name, value in row.items()}
