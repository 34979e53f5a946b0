"""The training loop."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal, NoReturn

import attrs

from nanochat_core.data.loader import Step
from nanochat_core.data.packing import Cursor
from nanochat_core.distributed.signals import Stopped, StopRequest
from nanochat_core.distributed.world import OtherRankFailed, World
from nanochat_core.errors import DataError
from nanochat_core.evaluation.evaluate import EvaluationStopped
from nanochat_core.hardware.machine import peak_flops, peak_memory_mib
from nanochat_core.interfaces.optimizer import Multipliers
from nanochat_core.loggers.run_log import Logs
from nanochat_core.planning.out_of_memory import OutOfMemory
from nanochat_core.planning.plan import Planned
from nanochat_core.planning.schedule import lr_multiplier, warmdown_progress
from nanochat_core.plugins.choice import DataSourceKeys
from nanochat_core.runs.directory import RunDirectory
from nanochat_core.training.checkpoints import Checkpoints
from nanochat_core.training.diagnosis import Divergence, diagnose, nothing_learned
from nanochat_core.training.metrics import Measured, StepTimer, step_row
from nanochat_core.training.parts import Parts
from nanochat_core.training.profiler import Profiler
from nanochat_core.training.step import StepOutcome, run_step

UNTIMED_STEPS = 10  # compilation and warm caches: not part of the training time

Status = Literal["finished", "preempted"]


@attrs.define
class Trainer:
    """The training loop of a run on this rank.

    Args:
        planned: the plan, and the experiment with every "auto" resolved.
        parts: the model, the optimizer, the data, the evaluations and the training state.
        checkpoints: saves the run.
        stop: knows whether this rank was asked to stop.
        heartbeat: called once per step, with a description of the progress.
    """

    planned: Planned
    world: World
    run_dir: RunDirectory
    parts: Parts
    checkpoints: Checkpoints
    logs: Logs
    stop: StopRequest
    heartbeat: Callable[[str], None]
    _skipped_in_row: int = attrs.field(default=0, init=False)
    _steps_here: int = attrs.field(default=0, init=False)
    _known_problems: int = attrs.field(default=0, init=False)

    def fit(self) -> Status:
        """Train to the horizon, or to the step at which a signal requests a stop.

        Raises:
            TrainingDiverged: after too many skipped steps in a row, or when every step was skipped.
            DataError: when the data are used up before the horizon, after saving; see ``[data] epochs``.
            OutOfMemory: when a step runs out of memory, after saving the steps before it.
            NotSaved, RunDisplaced: see ``Checkpoints.finish_saving``.
        """
        try:
            return self._loop()
        finally:
            self.checkpoints.wait()

    def _loop(self) -> Status:
        self.parts.model.train()
        if not self._evaluate(self.parts.evaluated):
            return self._preempted()
        with self._profiler() as profiler:
            while not self._at_horizon:
                self.heartbeat(f"after step {self.parts.state.step}")
                timer = StepTimer()
                step = self._next_step(timer)
                if step is None and self.world.size == 1:
                    return self._preempted()
                outcome = self.train_step(step, timer)
                if not outcome.done:
                    return self._preempted()
                profiler.step()
                if self._is_checkpoint_due(outcome):
                    self.checkpoints.save()
                if outcome.stop_requested and not self._at_horizon:
                    return self._preempted()
                if outcome.data_ended and not self._at_horizon:
                    self._end_without_data()
                if not self._evaluate():
                    return self._preempted()
        self.checkpoints.finish_saving("training has ended")
        if 0 < self.parts.state.step <= self.parts.state.skipped:
            self.world.raise_on_main(nothing_learned(self.parts.state.step))
        return "finished"

    def train_step(self, step: Step | None, timer: StepTimer) -> StepOutcome:
        """Run one optimizer step, and write its ledger row. Collective.

        Args:
            step: this rank's data; None when it was asked to stop while it waited for them.

        Raises:
            TrainingDiverged: after too many skipped steps in a row.
            OutOfMemory: when this step runs out of memory, after saving the steps before it.
        """
        plan, train, state = self.planned.plan, self.planned.experiment.train, self.parts.state
        multipliers, cursors = self.multipliers(), state.cursors
        if plan.scales_loss and step is not None:
            state.begin_loss_scale(step.batches[0].ids_BT.numel())
        outcome = run_step(
            step,
            self.parts.model,
            self.parts.optimizer,
            self.world,
            dtype=plan.torch_dtype,
            multipliers=multipliers,
            grad_clip=train.grad_clip,
            loss_scale=state.loss_scale if plan.scales_loss else 1.0,
            stop_requested=self.stop.signal is not None or self.checkpoints.displaced(),
        )
        if outcome.out_of_memory:
            self._end_out_of_memory(outcome)
        if step is not None and outcome.done:
            self._advance(step, outcome, timer, multipliers.lr)
            if self._skipped_in_row > train.max_skipped_steps:
                before = {lane: Cursor(*cursor) for lane, cursor in cursors.items()}
                self._end_diverged(
                    Divergence(state.step - 1, outcome, step, before, multipliers.lr, self._skipped_in_row)
                )
        return outcome

    # -- conditions of the loop

    @property
    def _at_horizon(self) -> bool:
        return self.parts.state.step >= self.planned.plan.num_iterations

    def _is_checkpoint_due(self, outcome: StepOutcome) -> bool:
        save_every = self.planned.experiment.checkpoint.save_every
        regular = save_every is not None and self.parts.state.step % save_every == 0
        return regular or self._at_horizon or outcome.stop_requested or outcome.data_ended

    def multipliers(self) -> Multipliers:
        """Return the factors of the schedule for the next step."""
        schedule, step = self.planned.experiment.schedule, self.parts.state.step
        steps = self.planned.plan.num_iterations
        lr, warmdown = lr_multiplier(schedule, step, steps), warmdown_progress(schedule, step, steps)
        return Multipliers(step, steps, lr, warmdown)

    # -- actions of the loop

    def _next_step(self, timer: StepTimer) -> Step | None:
        """Return the next step's data; None when a stop was requested while this rank waited for them."""
        try:
            with timer.waiting_for_data(), self.stop.interruptible():
                return next(self.parts.loader)
        except Stopped:
            return None

    def _advance(self, step: Step, outcome: StepOutcome, timer: StepTimer, lr: float) -> None:
        """Advance the state by a completed step, and write its ledger row."""
        state, plan = self.parts.state, self.planned.plan
        seconds = timer.seconds()
        state.step += 1
        state.tokens += outcome.tokens
        state.cursors = dict(step.cursors)  # only of this rank; a resumed state has those of all ranks
        self._steps_here += 1
        if self._steps_here > UNTIMED_STEPS:
            state.training_time += seconds
        if outcome.finite:
            self._skipped_in_row = 0
        else:
            self._skipped_in_row += 1
            state.skipped += 1
        if plan.scales_loss:
            state.adapt_loss_scale(outcome.finite)
        peak, _ = peak_flops(self.world.device, plan.torch_dtype)
        measured = Measured(seconds, timer.data_wait, lr, peak, peak_memory_mib(self.world.device))
        keys = self.planned.experiment.data.keys
        crops = isinstance(keys, DataSourceKeys) and keys.packing == "best_fit"
        row = step_row(outcome, state, plan, measured, crops=crops)
        for line in row.remarks:
            self.logs.report(line)
        self.logs.record(state.step - 1, row.values)
        self._report_data_problems()

    def _report_data_problems(self) -> None:
        problems = self.parts.source.problems()
        for line in problems[self._known_problems :]:
            self.logs.report(f"skipped in the data: {line}")
        self._known_problems = len(problems)

    def _evaluate(self, done: Collection[str] = ()) -> bool:
        """Run the evaluations that are due, then delete checkpoints that are not kept. False when a signal ended it.

        Args:
            done: names of entries that have evaluated this step already.
        """
        state = self.parts.state
        try:
            for name, evaluation in self.parts.evaluations.run(self.parts.model, state.step, done):
                state.note_minimum(evaluation.metrics)
                self.checkpoints.note(evaluation.metrics)
                self.logs.record(state.step, {"evaluator": name, **evaluation.metrics, **evaluation.texts})
        except EvaluationStopped:
            return False
        self.checkpoints.retain()
        return True

    def _profiler(self) -> Profiler:
        steps = self.planned.experiment.train.profile
        ahead = self.planned.plan.num_iterations - self.parts.state.step
        return Profiler(self.run_dir.profile, self.world, steps, UNTIMED_STEPS, ahead, self.logs.report)

    # -- ends before the horizon

    def _preempted(self) -> Status:
        self.checkpoints.save_unless_saved()
        self.checkpoints.finish_saving("the run was told to stop")
        step = self.parts.state.step
        self.logs.report(f"stopped by a signal after step {step}, saved; continue with --resume")
        return "preempted"

    def _end_out_of_memory(self, outcome: StepOutcome) -> NoReturn:
        """Save the completed steps; raise OutOfMemory on ranks without memory, and OtherRankFailed on the others."""
        step = self.parts.state.step
        if self._steps_here:
            self.checkpoints.save_unless_saved()
            self.checkpoints.finish_saving(f"a rank ran out of memory in training step {step}")
        else:
            self.checkpoints.finish_saving()
        if not outcome.memory_error:
            self.logs.note(f"another rank ran out of memory in step {step}")
            raise OtherRankFailed(OutOfMemory.exit_code)
        raise OutOfMemory(self.planned.plan, f"training step {step}", outcome.memory_error)

    def _end_diverged(self, divergence: Divergence) -> NoReturn:
        self.checkpoints.finish_saving()
        dtype = self.planned.plan.torch_dtype
        self.world.raise_on_main(diagnose(divergence, self.parts, dtype, self.world, self.run_dir))

    def _end_without_data(self) -> NoReturn:
        """Raise the error for data that ended before the horizon. Call it after saving the step."""
        self.checkpoints.finish_saving("the training data are used up")
        step, keys = self.parts.state.step, self.planned.experiment.data.keys
        assert isinstance(keys, DataSourceKeys)
        error = DataError(
            f"the training data are used up after step {step} of {self.planned.plan.num_iterations} "
            f"(epochs = {keys.epochs!r}), which is saved. To continue: --resume with more epochs, as in "
            f"--set data.epochs=repeat, or with fewer steps, as in --set train.num_iterations={step}",
            key="data.epochs",
        )
        self.world.raise_on_main(error)
