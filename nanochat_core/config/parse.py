"""TOML text to values, within limits that no experiment needs to exceed."""

from __future__ import annotations

import re
import tomllib
from typing import Any

from nanochat_core.config.toml_lines import KeyPath, line_numbers
from nanochat_core.plugins.structure import INTEGERS

LARGEST_FILE = 1 << 20  # bytes
DEEPEST = 32  # tables and lists within each other; parts of a key

# tomllib takes quadratic time for the parts of a key.
_LONG_KEY = re.compile(rf"(?:^|[\[{{,])[ \t]*(?:[^\s.=,\[\]{{}}#]+[ \t]*\.[ \t]*){{{DEEPEST}}}", re.MULTILINE)
_LONG_NUMBER = re.compile(r"[0-9_]{4300}")  # Python reads no longer decimal number
_DEEP = f"is nested too deeply: at most {DEEPEST} tables and lists may be within each other"


class NotAccepted(ValueError):
    """A text that is not valid TOML, or exceeds a limit.

    Args:
        key: dotted key, empty for the text as a whole; ``line``: its line, from 1; 0 if unknown.
    """

    def __init__(self, message: str, key: str = "", line: int = 0) -> None:
        super().__init__(message)
        self.key, self.line = key, line


def parse_toml(text: str) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """Return the content of a TOML text, and the line of each key.

    Raises:
        NotAccepted: when the text is not valid, has an integer of more than 64 bits, or is nested too deeply.
    """
    long = _LONG_KEY.search(text)
    if long is not None:
        raise NotAccepted(f"a key has more than {DEEPEST} parts", line=_line(text, long.end()))
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        raise NotAccepted(f"not valid TOML: {error}", line=int(line[1]) if line else 0) from None
    except RecursionError:
        raise NotAccepted(_DEEP) from None
    except ValueError:  # of int()
        number = _LONG_NUMBER.search(text)
        raise NotAccepted("a number has too many digits", line=_line(text, number.start()) if number else 0) from None
    lines = line_numbers(text)
    _check(content, lines)
    return content, lines


def parse_value(text: str) -> Any:
    """Return the value that a TOML text stands for, as on the right of a ``=``.

    Raises:
        NotAccepted: when it exceeds a limit.
        tomllib.TOMLDecodeError: when it is no value of TOML.
    """
    try:
        content = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        raise
    except RecursionError:
        raise NotAccepted(_DEEP) from None
    except ValueError:  # of int()
        raise NotAccepted("the number has too many digits") from None
    if content.keys() != {"value"}:
        raise tomllib.TOMLDecodeError("more than one value")
    _check(content, {})
    return content["value"]


def _check(content: dict[str, Any], lines: dict[KeyPath, int]) -> None:
    """Raise NotAccepted for values beyond the limits."""
    waiting: list[tuple[KeyPath, Any]] = [((), content)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict | list):
            if len(path) > DEEPEST:
                raise NotAccepted(_DEEP, _dotted(path[:2]), _line_of(path, lines))
            below = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += [((*path, key), item) for key, item in below]
        elif isinstance(value, int) and value not in INTEGERS:
            raise NotAccepted("an integer must fit into 64 bits", _dotted(path), _line_of(path, lines))


def _dotted(path: KeyPath) -> str:
    return ".".join(part for part in path if isinstance(part, str))


def _line_of(path: KeyPath, lines: dict[KeyPath, int]) -> int:
    return next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), 0)


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1
