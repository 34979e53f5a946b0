"""The exceptions users meet. Each is printed as a message without a traceback; the command ends with exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from nanochat_core.planning.plan import Plan


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


class OutOfMemory(NanochatError):
    """A device has not enough memory for the run.

    Args:
        plan: of the run; ``doing``: what it was doing.
        said: what torch said.
    """

    exit_code = 4

    def __init__(self, plan: Plan, doing: str, said: str = "") -> None:
        parts = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in plan.memory.items())
        again = "" if plan.activation_checkpointing else ", then set train.activation_checkpointing = true"
        rows = plan.device_batch_size
        lower = f"lower train.device_batch_size, now {rows} (the total batch stays as it is)" if rows > 1 else ""
        remedy = f"{lower}{again}".removeprefix(", then ") or "take a smaller model or train.max_seq_len"
        estimate = f"estimated were {sum(plan.memory.values()) / 2**20:,.0f} MiB a device ({parts})"
        first = said.strip().partition("\n")[0]
        super().__init__(f"out of memory while {doing}; {estimate}. {remedy[0].upper()}{remedy[1:]}. {first}".rstrip())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch says that a device, or the machine, has no memory left."""
    known = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in known)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` (did you mean "x"?)``, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f' (did you mean "{close[0]}"?)' if close else ""
