"""The exceptions users meet. Each is printed as a message without a traceback; the command ends with exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

import attrs


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


class NanochatError(Exception):
    """Something a user can mend. The message says what is wrong and what to do next.

    Args:
        message: without file and key, which are printed in front of it.
        key: the option it is about, if any. A plugin gives the option's own name, such as ``path``; the core completes
            it to ``data.path``, and adds file and line. The core gives whole keys.
    """

    exit_code = 2
    problems: tuple[Problem, ...] = ()
    _table = ""

    def __init__(self, message: str = "", *, key: str = "") -> None:
        self._set((Problem(key, message),))

    def _set(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        self.args = ("\n".join(map(str, self.problems)),)

    def in_table(self, table: str) -> None:
        """Complete the keys: they are names of options in ``table``, such as ``data`` or ``evaluators.mine``. Only the
        first call counts, for an error may pass through several plugins. A key that is whole already stays.
        """
        if self._table or not table or not self.problems:
            return
        self._table, root = table, table.partition(".")[0]
        self._set(
            attrs.evolve(p, key=f"{table}.{p.key}") if p.key and p.key.partition(".")[0] != root else p
            for p in self.problems
        )

    def add_places(self, places: Mapping[str, str]) -> None:
        """Say where the keys stand, unless that is said already.

        Args:
            places: ``file:line`` or the like, by whole key.
        """
        if self.problems:
            self._set(attrs.evolve(p, where=p.where or (places.get(p.key, "") if p.key else "")) for p in self.problems)


class ConfigError(NanochatError):
    """Everything that is wrong with an experiment, all at once: one message, or several problems."""

    def __init__(self, problems: Sequence[Problem] | str, *, key: str = "") -> None:
        self._set((Problem(key, problems),) if isinstance(problems, str) else problems)


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
