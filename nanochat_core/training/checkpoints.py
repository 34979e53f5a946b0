"""Saving a run in progress: rank 0 collects the parts of a checkpoint from all ranks and writes it."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from nanochat_core.distributed.world import World
from nanochat_core.loggers.run_log import Logs
from nanochat_core.planning.plan import Planned
from nanochat_core.runs.checkpoint import CheckpointContent, model_tensors
from nanochat_core.runs.restore import distributions_of
from nanochat_core.runs.saver import Saver
from nanochat_core.runs.state import rng_state
from nanochat_core.runs.upgrades import ModelRecord
from nanochat_core.training.parts import Parts


@attrs.define
class Checkpoints:
    """The checkpoints of a run on this rank. ``save``, ``save_unless_saved`` and ``finish_saving`` are collective.

    Args:
        saver: writes the checkpoints, on rank 0.
    """

    saver: Saver
    parts: Parts
    planned: Planned
    world: World
    logs: Logs
    _saved: int | None = attrs.field(init=False)  # step of the last checkpoint that was saved or attempted

    def __attrs_post_init__(self) -> None:
        self._saved = self.saver.sound

    def save(self) -> None:
        """Save a checkpoint of the current step. A save that fails is reported and does not stop the run."""
        state, world = self.parts.state, self.world
        self._saved = state.step
        optimizer_state = self.parts.optimizer.state_dict()  # collective
        by_rank = world.all_gather_object((dict(state.cursors), rng_state(world.device)))
        if world.is_main:
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
        if self.world.is_main and self._saved == self.parts.state.step:
            self.saver.retain(self.parts.state.step)

    def finish_saving(self) -> None:
        """Wait on every rank until rank 0 has written everything, because a rank that ends may end the others."""
        self.saver.wait()
        self.world.barrier()

    def wait(self) -> None:
        """Wait until this rank has written everything."""
        self.saver.wait()
