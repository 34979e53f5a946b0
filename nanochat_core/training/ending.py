"""Ends of a run that would lose something: its directory was moved or deleted meanwhile, or the last step is not on
disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nanochat_core.errors import CheckpointError
from nanochat_core.runs.directory import RunDirectory
from nanochat_core.runs.lock import RunLock
from nanochat_core.training.parts import Parts
from nanochat_core.training.prepare import Setup
from nanochat_core.training.run_files import write_run_files


class RunDisplaced(CheckpointError):
    """The directory of a run was moved, replaced or deleted while it trained."""

    exit_code = 5


class NotSaved(CheckpointError):
    """The last step of a run could not be saved, also not when that was tried again."""

    exit_code = 6


def rescue_directory(path: Path) -> RunDirectory:
    """Create a run directory beside the one at ``path``, which is lost.

    Raises:
        OSError: when it can't be created.
    """
    number = 1
    while True:
        rescued = path.with_name(f"{path.name}-rescued{number if number > 1 else ''}")
        try:
            rescued.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return RunDirectory(rescued)


def write_rescued(run_dir: RunDirectory, setup: Setup, parts: Parts, report: Callable[[str], None]) -> None:
    """Write everything but ledger and checkpoints that a run needs to be resumed or sampled into a new directory.

    Raises:
        OSError: when it can't be written.
    """
    run_dir.tokenizer.mkdir()
    parts.tokenizer.save(run_dir.tokenizer)
    # as a fresh start: there is nothing to compare with
    write_run_files(setup.fresh_in(run_dir), parts.state, parts.state.fingerprints, report)


def where_to_go_on(lock: RunLock, write: Callable[[RunDirectory], None]) -> tuple[str, RunDirectory, RunLock]:
    """Find or make the directory in which a run whose own was moved, replaced or deleted is saved.

    Args:
        write: writes the run's files into a directory that was made for it.

    Returns:
        What has happened, as a sentence; the directory; and its lock.

    Raises:
        OSError, CheckpointError: when it can't be written.
    """
    what, where = lock.lost(), lock.where()
    if where is not None:
        return f"{lock.path} {what} while the run was training in it", RunDirectory(where), lock
    rescued = rescue_directory(lock.path)
    own = rescued.lock()
    write(rescued)
    return f"{lock.path} {what} while the run was training in it: it goes to {rescued.path}", rescued, own
