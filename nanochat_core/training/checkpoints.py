"""Saving a run in progress: rank 0 collects the parts of a checkpoint from all ranks and writes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

import attrs

from nanochat_core.distributed.signals import Stopped, StopRequest
from nanochat_core.distributed.world import World
from nanochat_core.errors import CheckpointError
from nanochat_core.loggers.run_log import Logs
from nanochat_core.planning.plan import Planned
from nanochat_core.runs.checkpoint import CheckpointContent, checkpoint_name, model_tensors, verify
from nanochat_core.runs.directory import RunDirectory
from nanochat_core.runs.lock import RunLock
from nanochat_core.runs.restore import distributions_of
from nanochat_core.runs.saver import Saver
from nanochat_core.runs.state import rng_state
from nanochat_core.runs.upgrades import ModelRecord
from nanochat_core.training.ending import NotSaved, RunDisplaced, where_to_go_on
from nanochat_core.training.parts import Parts

PAUSES = (0.0, 1.0, 2.0, 4.0, 8.0, 15.0)  # seconds before the last save is tried again


@attrs.define
class Checkpoints:
    """The checkpoints of a run on this rank. ``save``, ``save_unless_saved`` and ``finish_saving`` are collective.

    Args:
        saver: writes the checkpoints, on rank 0.
        stop: knows whether this rank was asked to stop.
        lock: of the run directory, on rank 0.
        write_rescued: writes the run's files into a directory that takes the place of one that was deleted.
    """

    saver: Saver
    parts: Parts
    planned: Planned
    world: World
    logs: Logs
    stop: StopRequest
    lock: RunLock | None
    write_rescued: Callable[[RunDirectory], None]
    _displaced: str = attrs.field(default="", init=False)  # what has become of the run's directory
    _saved: int | None = attrs.field(init=False)  # step of the last checkpoint that was saved or attempted

    def __attrs_post_init__(self) -> None:
        self._saved = self.saver.sound

    def displaced(self) -> bool:
        """Whether the run's directory is not where it was when the run began; rank 0 looks. From then on the run is
        written where the directory is now, or else into a new one. Takes microseconds."""
        if self.lock is None or self.lock.where() == self.lock.path:
            return bool(self._displaced)
        try:
            self._displaced, run_dir, self.lock = where_to_go_on(self.lock, self.write_rescued)
            self.lock.path = run_dir.path
            self.saver.directory, self.saver.ledger = run_dir.checkpoints, run_dir.ledger
            self.logs.move(run_dir)
            self.logs.report(f"{self._displaced}; the run is saved there, and stops")
        except (OSError, CheckpointError) as error:
            what = f"{self.lock.path} {self.lock.lost()}, and no other directory can be made: {error}"
            if what != self._displaced:
                self._displaced = what
                self.logs.report(what)
        return True

    def save(self) -> None:
        """Save a checkpoint of the current step. A save that fails is reported and does not stop the run."""
        state, world = self.parts.state, self.world
        self._saved = state.step
        optimizer_state = self.parts.optimizer.state_dict()  # collective
        by_rank = world.all_gather_object((dict(state.cursors), rng_state(world.device)))
        if world.is_main:
            self.displaced()
            self.logs.keep_ledger()
            for cursors, _ in by_rank:
                state.cursors.update(cursors)
            state.ledger_bytes = self.logs.ledger_bytes()
            content = CheckpointContent(
                model_tensors(self.parts.model),
                optimizer_state,
                {f"{rank}/{name}": t for rank, (_, rng) in enumerate(by_rank) for name, t in rng.items()},
                state,
                ModelRecord.of(self.planned.experiment.model),
                distributions_of(self.planned.experiment),
            )
            self.saver.save(content)
            self.logs.status("running", state.step, self.planned.plan.num_iterations)
        world.barrier()

    def save_unless_saved(self) -> None:
        """Save a checkpoint of the current step, unless that was done or attempted already."""
        if self._saved != self.parts.state.step:
            self.save()

    def note(self, metrics: Mapping[str, float | str]) -> None:
        """Record the metrics of an evaluation of the current step, by which the best checkpoints are chosen."""
        self.saver.note(self.parts.state.step, metrics)

    def retain(self) -> None:
        """Delete checkpoints that are not kept, if the current step was saved. Call it after evaluating the step."""
        if self.world.is_main and self._saved == self.parts.state.step and not self.displaced():
            self.saver.retain(self.parts.state.step)

    def finish_saving(self, why: str = "") -> None:
        """Wait on every rank until rank 0 has written everything, because a rank that ends may end the others.

        Args:
            why: what ends the run, as a clause. With it the current step must be on disk and sound: a save that failed
                is tried again for a while. Without it the run ends because of an error, and keeps what it has.

        Raises:
            NotSaved: when the current step can't be saved; on other ranks OtherRankFailed.
            RunDisplaced: when the run is saved, but not in the directory in which it began; likewise.
        """
        if not why:
            self.world.on_main(self.saver.wait)
            return
        problem: str = self.world.on_main(self._last_problem)
        for pause in PAUSES:
            if not problem or not self.world.on_main(partial(self._pause, pause)):
                break
            self.save()
            problem = self.world.on_main(self._last_problem)
        if problem:
            self.world.raise_on_main(self._not_saved(problem, why))
        displaced: str = self.world.on_main(lambda: self.displaced() and self._displaced)
        if displaced:
            step, where = self.parts.state.step, self.saver.directory.parent
            self.world.raise_on_main(
                RunDisplaced(
                    f"{displaced}. It has stopped after step {step}, and all of it is in {where}: continue it with "
                    f"--resume {where}"
                )
            )

    def wait(self) -> None:
        """Wait until this rank has written everything."""
        self.saver.wait()

    # -- on rank 0

    def _last_problem(self) -> str:
        """Return why the current step is not saved; empty when its checkpoint is on disk and sound."""
        self.saver.wait()
        self.displaced()
        step = self.parts.state.step
        path = self.saver.directory / checkpoint_name(step)
        if self.saver.sound != step:
            return self.saver.problem or f"{path} was not written"
        problem = verify(path)
        return f"{path}: {problem}" if problem else ""

    def _pause(self, seconds: float) -> bool:
        """Wait before another attempt. Returns False when a first signal asks to give up; a second one ends it all."""
        if self.stop.signal is not None:
            time.sleep(seconds)
            return True
        try:
            with self.stop.interruptible():
                time.sleep(seconds)
        except Stopped:
            return False
        return True

    def _not_saved(self, problem: str, why: str) -> NotSaved:
        step, sound = self.parts.state.step, self.saver.sound
        last = f"the last checkpoint is that of step {sound}" if sound is not None else "there is no checkpoint"
        return NotSaved(
            f"{why}, but step {step} could not be saved, although that was tried again: {problem}. "
            f"{last[0].upper()}{last[1:]}. Make it possible to save, and continue with --resume"
        )
