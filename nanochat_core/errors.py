"""Exceptions for errors that a user can fix, printed as a message without a traceback. The exit code is usually 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

import attrs


@attrs.frozen
class Problem:
    """An error in an experiment.

    Args:
        key: dotted key, such as ``model.depth``; empty for an error of the file as a whole.
        message: what is wrong, and what to do about it.
        where: ``file:line``, the name of a file, or ``--set``; empty if unknown.
    """

    key: str
    message: str
    where: str = ""

    def __str__(self) -> str:
        return ": ".join(part for part in (_cut(self.where, 300), _cut(self.key, 200), _cut(self.message)) if part)


def _cut(text: str, most: int = 1200) -> str:
    """Return a text that a user may have written: long lines are cut, control characters are escaped."""
    lines = [line if len(line) <= most else f"{line[: most - 3]}..." for line in text.split("\n")]
    if all(line.isprintable() for line in lines):
        return "\n".join(lines)
    return "\n".join("".join(c if c.isprintable() or c == "\t" else ascii(c)[1:-1] for c in line) for line in lines)


class NanochatError(Exception):
    """An error that a user can fix.

    Args:
        message: what is wrong and what to do next, without file and key, which are printed in front of it.
        key: the option that is wrong, if any. A plugin gives the option's own name, such as ``path``; the core
            completes it to ``data.path`` and adds file and line. The core itself gives complete keys.
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
        """Complete keys that are names of options in ``table``, such as ``data`` or ``evaluators.mine``.

        Only the first call has an effect, since an error may pass through several plugins. Complete keys are kept.
        """
        if self._table or not table or not self.problems:
            return
        self._table, root = table, table.partition(".")[0]
        self._set(
            attrs.evolve(p, key=f"{table}.{p.key}") if p.key and p.key.partition(".")[0] != root else p
            for p in self.problems
        )

    def add_places(self, places: Mapping[str, str]) -> None:
        """Add the places of the keys to problems that have none.

        Args:
            places: where each value was given, such as ``file:line``, by complete key.
        """
        if self.problems:
            self._set(attrs.evolve(p, where=p.where or (places.get(p.key, "") if p.key else "")) for p in self.problems)


class ConfigError(NanochatError):
    """An invalid experiment, with all of its problems: a single message, or several ``Problem`` objects."""

    def __init__(self, problems: Sequence[Problem] | str, *, key: str = "") -> None:
        self._set((Problem(key, problems),) if isinstance(problems, str) else problems)


class PassesPlugins:
    """Marks exceptions with which the core ends work in progress, such as a request to stop: they pass through code of
    plugins, and are never taken for a failure of a plugin."""


class PluginError(NanochatError):
    """A plugin that is missing, fails, or breaks the contract of its kind."""


class DataError(NanochatError):
    """Data that are missing, unreadable, or too few."""


class CheckpointError(NanochatError):
    """A run or checkpoint that is missing, damaged, or does not fit the experiment."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean "x"?)`` with the word of ``known`` that is most similar; empty if none is similar."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f' (did you mean "{close[0]}"?)' if close else ""
