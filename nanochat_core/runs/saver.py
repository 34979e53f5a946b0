"""Writing the checkpoints of a run, at once or in the background, and deleting those that are not kept."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from nanochat_core.config.schema import Checkpoint
from nanochat_core.errors import CheckpointError
from nanochat_core.files import sync
from nanochat_core.runs.checkpoint import (
    CheckpointContent,
    remove_checkpoint,
    save_checkpoint,
)
from nanochat_core.runs.directory import list_checkpoints, step_of
from nanochat_core.runs.retention import steps_to_delete


@attrs.define
class Saver:
    """The writer of a run's checkpoints, which also deletes those that are not kept. Used on rank 0.

    Args:
        directory: of the checkpoints.
        options: ``[checkpoint]``.
        report: prints and logs a line; called in the thread that writes if there is one.
        ledger: synced to the disk before each checkpoint.
        sound: step of the newest checkpoint that is known to be sound; it is never deleted.
        problem: why the last save failed; empty if it did not.
        scores: value of ``options.best_metric`` by step, of evaluations so far.
    """

    directory: Path
    options: Checkpoint
    report: Callable[[str], None]
    ledger: Path | None = None
    sound: int | None = None
    problem: str = ""
    scores: dict[int, float] = attrs.field(factory=dict)
    _thread: ThreadPoolExecutor | None = attrs.field(default=None, init=False)  # runs one task after the other
    _tasks: list[Future[None]] = attrs.field(factory=list, init=False)
    _keep_best_reported: bool = attrs.field(default=False, init=False)

    def save(self, content: CheckpointContent) -> None:
        """Write a checkpoint, or copy it off the device and write it in the background. A failure is reported.

        At most one copy waits to be written: the next save waits for it.
        """
        if not self.options.asynchronous:
            return self._save(content)
        self.wait()
        self._do_later(self._save, _copy_of(content))

    def note(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """Note the metrics of an evaluation at ``step``."""
        value = metrics.get(self.options.best_metric or "")
        if isinstance(value, int | float):
            self.scores[step] = value

    def retain(self, step: int) -> None:
        """Delete checkpoints that are not kept, after saves in progress are done. A failure to delete is reported.

        Args:
            step: of the run. Later checkpoints, which a run that resumed from an earlier one found damaged, are left
                alone and don't count.
        """
        if self.options.asynchronous:
            self._do_later(self._retain, step, dict(self.scores))
        else:
            self._retain(step, self.scores)

    def wait(self) -> None:
        """Wait until everything is written and deleted."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.result()  # raises an error that is not about writing

    def _do_later(self, work: Callable[..., None], *arguments: Any) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._tasks.append(self._thread.submit(work, *arguments))

    def _save(self, content: CheckpointContent) -> None:
        if self.ledger is not None:
            with contextlib.suppress(OSError):
                sync(self.ledger)
        try:
            path = save_checkpoint(self.directory, content)
        except CheckpointError as error:
            self.problem = str(error)
            self.report(f"{error}; the last good checkpoint stays")
        else:
            self.sound, self.problem = content.state.step, ""
            self.report(f"saved {path}")

    def _retain(self, step: int, scores: Mapping[int, float]) -> None:
        paths = {step_of(path): path for path in list_checkpoints(self.directory)}
        steps = [each for each in paths if each <= step]
        doomed = [each for each in steps_to_delete(steps, scores, self.options) if each != self.sound]
        for each in doomed:
            try:
                remove_checkpoint(paths[each])
            except OSError as error:
                self.report(f"checkpoint {paths[each]} can't be deleted: {error}")
        options, unscored = self.options, not any(each in scores for each in steps)
        if (
            options.keep_best is not None
            and unscored
            and not self._keep_best_reported
            and len(steps) > (options.keep_last or 1)
        ):
            self._keep_best_reported = True
            self.report(
                f"checkpoint.keep_best: no saved step has an evaluation with {self.options.best_metric!r}, so all "
                f"checkpoints stay: evaluate at steps that are saved, or set checkpoint.best_metric to one of the "
                f"ledger's metrics"
            )


def _copy_of(content: CheckpointContent) -> CheckpointContent:
    """A copy on the CPU that shares no memory with the tensors that training changes."""

    def copies(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

    return attrs.evolve(
        content,
        model=copies(content.model),
        optimizer=copies(content.optimizer),
        rng=copies(content.rng),
        state=copy.deepcopy(content.state),
    )
