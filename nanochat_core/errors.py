"""The exceptions users meet. Each is printed as a message without a traceback; the command ends with exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    pass


class NanochatError(Exception):
    """Something a user can mend. The message says what is wrong and what to do next."""

    exit_code = 2


@attrs.frozen
class Problem:
    """One thing wrong in a config.

    Args:
        key: dotted key path, such as ``model.depth``; empty when the file as a whole is meant.
        message: what is wrong and what would be right.
        where: ``file:line``, a file name, or ``--set``; empty when unknown.
    """

    key: str
    message: str
    where: str = ""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.key, self.message) if part)


class ConfigError(NanochatError):
    """Everything that is wrong with an experiment, all at once."""

    def __init__(self, problems: Sequence[Problem] | str) -> None:
        self.problems = (Problem("", problems),) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(str(p) for p in self.problems))


class PluginError(NanochatError):
    """A plugin is missing, broken, or breaks the contract of its kind."""


class DataError(NanochatError):
    """Data are missing, unreadable, or too few."""


class CheckpointError(NanochatError):
    """A run or checkpoint is missing, damaged, or does not fit."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` (did you mean "x"?)``, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f' (did you mean "{close[0]}"?)' if close else ""
