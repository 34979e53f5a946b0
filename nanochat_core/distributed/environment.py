"""What a process finds in its environment about the job it belongs to, and the start of processes like it. No torch."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import attrs

from nanochat_core.errors import ConfigError, Problem
from nanochat_core.files import shorten

MOST_RANKS = 2**20
REMEDY = "start several processes with --nproc or torchrun, which set all of them, or unset {} if they are left over"


@attrs.frozen
class Place:
    """A process's place in its job, as torchrun and our launcher describe it.

    Args:
        rank: of this process.
        size: number of processes.
        local_rank: number of this process on its machine, and so of its device.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def is_worker() -> bool:
    """Whether this process was started as one of several, or as the only one of a job."""
    return bool(os.environ.get("WORLD_SIZE"))


def find_place() -> Place:
    """Return this process's place, from RANK, WORLD_SIZE and LOCAL_RANK. A process without them is alone.

    Raises:
        ConfigError: when they, MASTER_ADDR or MASTER_PORT are missing, odd, or contradict each other.
    """
    size = _number("WORLD_SIZE", 1, MOST_RANKS, 1)
    rank = _number("RANK", 0, MOST_RANKS, 0)
    local_rank = _number("LOCAL_RANK", 0, MOST_RANKS, 0)
    if rank >= size:
        given = f"WORLD_SIZE is {size}" if is_worker() else "WORLD_SIZE is not set, as in a job of one process"
        raise _odd("RANK", f"is {rank}, but {given}", "RANK and WORLD_SIZE")
    if size > 1:
        names = ("RANK", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in names if not os.environ.get(name, "").strip()]
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            raise _odd("WORLD_SIZE", f"is {size}, but {', '.join(missing)} {verb} not set", "WORLD_SIZE")
        _number("MASTER_PORT", 1, 65535, 0)
    return Place(rank, size, local_rank)


def check_nproc(nproc: int) -> None:
    """Refuse ``--nproc N`` in a process of a job that has another number of processes.

    Raises:
        ConfigError: saying what to do.
    """
    if nproc > 1 and is_worker() and find_place().size != nproc:
        size = find_place().size
        message = f"is {nproc}, but WORLD_SIZE is {size}: omit --nproc under torchrun, or unset WORLD_SIZE if it is "
        raise ConfigError([Problem("", f"{message}left over", "--nproc")])


def _number(name: str, least: int, most: int, default: int) -> int:
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or not least <= int(text) <= most:
        raise _odd(name, f"is {shorten(text)}, not a whole number from {least} to {most}", name)
    return int(text)


def _odd(name: str, message: str, unset: str) -> ConfigError:
    return ConfigError([Problem("", f"{message}: {REMEDY.format(unset)}", f"the environment variable {name}")])


def python_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module of ours in another Python. Start it with ``python_environment``.

    With -P the working directory is not on the path of its imports, where a file ``token.py`` would take the place of
    the standard library's.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def python_environment(more: Mapping[str, str]) -> dict[str, str]:
    """Return our environment and ``more``, in which a Python imports from the same directories as this one."""
    paths = [str(Path(path).resolve()) for path in sys.path if path]
    return {**os.environ, **more, "PYTHONPATH": os.pathsep.join(paths)}
