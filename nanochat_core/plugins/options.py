"""``option``: one documented field of a config class. Imports no torch, so that config modules stay cheap."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import attrs

from nanochat_core.files import LONGEST_NAME, name_problem, shorten

# What happens when a run is resumed with another value of the option.
OnResume = Literal["free", "warn", "refuse"]


def option(
    default: Any = attrs.NOTHING,
    help: str = "",
    *,
    validator: Callable[[Any, Any, Any], Any] | list[Callable[[Any, Any, Any], Any]] | None = None,
    on_resume: OnResume | None = None,
    unverified: str = "",
) -> Any:
    """Return a field of an attrs config class, with the text that ``nanochat plugins KIND/NAME`` prints for it.

    Args:
        default: value when a TOML file does not set the option; without a default the option is required.
        help: one line: what it does, its unit, what its special values mean.
        validator: attrs validator(s) ``(instance, attribute, value)`` that raise ``ValueError`` with a remedy.
        on_resume: whether a run may be resumed with another value; None takes the rule of the option's table.
        unverified: one line, for an option whose code has never run on the hardware it is meant for: what has not run
            where. Shown in the option's help, and for an experiment whose value differs from the default.
    """
    metadata = {"help": help, "on_resume": on_resume, "unverified": unverified}
    if isinstance(default, list | dict | set):
        raise TypeError("an option's default must be immutable: use a tuple")
    return attrs.field(default=default, validator=validator, metadata=metadata)


# The bound of numbers that have no other: whole numbers up to here are exact as floats too.
MOST = 2**53

Validator = Callable[[Any, Any, Any], None]


def shown(value: Any) -> str:
    """Return a value as TOML writes it, for a message: on one line, without control characters, cut if it is long."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    text = shorten(value)
    if isinstance(value, str) and text.startswith("'"):
        text = f'"{text[1:]}'
        text = f'{text[:-1]}"' if text.endswith("'") else text
    return text


def one_of(*values: Any) -> Validator:
    """Validator: the value is one of ``values``."""

    def check(_: Any, attribute: Any, value: Any) -> None:
        if value not in values:
            raise ValueError(f"must be one of {', '.join(map(repr, values))}, not {shown(value)}")

    return check


def regular_file(what: str) -> Validator:
    """Validator: the path, when there is one, is that of a regular file, or of a link to one.

    Args:
        what: the file that is meant, such as "a tokenizer.json".
    """

    def check(_: Any, attribute: Any, value: Path | None) -> None:
        try:
            if value is None or value.is_file():
                return
            problem = f"is not a file, or not a regular one: set it to {what}"
        except (OSError, ValueError) as error:
            problem = f"is not a file ({getattr(error, 'strerror', None) or error}): set it to {what}"
        raise ValueError(f"{shorten(str(value), 200)} {problem}")

    return check


def at_least(minimum: float, most: float = MOST, *, below: float = math.inf) -> Validator:
    """Validator: the value, when it is a number, and each number of a list lies in [minimum, most].

    Args:
        most: an upper bound that no sensible value exceeds, so that nothing overflows or takes for ever.
        below: the value must also be less than this, such as 1 for a decay rate.
    """
    return _bounds(lambda number: number >= minimum, f"must be at least {minimum}", most, below)


def above(minimum: float, most: float = MOST) -> Validator:
    """Validator: the value, when it is a number, and each number of a list lies in (minimum, most]."""
    return _bounds(lambda number: number > minimum, f"must be greater than {minimum}", most)


def between(low: float, high: float) -> Validator:
    """Validator: the value, when it is a number, and each number of a list lies in [low, high]."""
    return _bounds(lambda number: low <= number <= high, f"must lie between {low} and {high}")


def _bounds(fits: Callable[[float], bool], must: str, most: float = math.inf, below: float = math.inf) -> Validator:
    def check(_: Any, attribute: Any, value: Any) -> None:
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, int | float) or isinstance(number, bool):
                continue
            if not fits(number):
                raise ValueError(f"{must}, not {shown(number)}")
            if number > most:
                limit = f"{most:,}" if isinstance(most, int) else f"{most:g}"
                raise ValueError(f"must be at most {limit}, not {shown(number)}")
            if below < math.inf and not number < below:
                raise ValueError(f"must be less than {below}, not {shown(number)}")

    return check


def one_line(_: Any, attribute: Any, value: Any) -> None:
    """Validator: the value, when it is text, and each text of a list is one line that people can read."""
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str) and not (len(text) <= LONGEST_NAME and text.isprintable() and text == text.strip()):
            raise ValueError(
                f"must be one line of at most {LONGEST_NAME} characters, without control characters and without blanks "
                f"at its ends, not {shown(text)}"
            )


def file_name(_: Any, attribute: Any, value: Any) -> None:
    """Validator: the value is empty, or may become the name of a file or directory."""
    problem = name_problem(value) if value else ""
    if problem:
        raise ValueError(f"{problem}: {shown(value)}")
