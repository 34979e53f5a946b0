"""``option``: one documented field of a config class. Imports no torch, so that config modules stay cheap."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import attrs

from nanochat_core.files import shorten

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


def one_of(*values: Any) -> Callable[[Any, Any, Any], None]:
    """Validator: the value is one of ``values``."""

    def check(_: Any, attribute: Any, value: Any) -> None:
        if value not in values:
            raise ValueError(f"must be one of {', '.join(map(repr, values))}, not {value!r}")

    return check


def regular_file(what: str) -> Callable[[Any, Any, Any], None]:
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


def at_least(minimum: float) -> Callable[[Any, Any, Any], None]:
    """Validator: the value, when it is a number, is at least ``minimum``."""

    def check(_: Any, attribute: Any, value: Any) -> None:
        if isinstance(value, int | float) and not value >= minimum:
            raise ValueError(f"must be at least {minimum}, not {value}")

    return check


def above(minimum: float) -> Callable[[Any, Any, Any], None]:
    """Validator: the value, when it is a number, is greater than ``minimum``."""

    def check(_: Any, attribute: Any, value: Any) -> None:
        if isinstance(value, int | float) and not value > minimum:
            raise ValueError(f"must be greater than {minimum}, not {value}")

    return check


def between(low: float, high: float) -> Callable[[Any, Any, Any], None]:
    """Validator: the value, when it is a number, lies in [low, high]."""

    def check(_: Any, attribute: Any, value: Any) -> None:
        if isinstance(value, int | float) and not low <= value <= high:
            raise ValueError(f"must lie between {low} and {high}, not {value}")

    return check


def plain_name(_: Any, attribute: Any, value: str) -> None:
    if value != value.strip() or any(c in value for c in '/\\\0:"') or value.startswith("."):
        raise ValueError(f"must be usable as a directory name, not {value!r}")


def finite(_: Any, attribute: Any, value: Any) -> None:
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"must be a finite number greater than 0, not {value}")
