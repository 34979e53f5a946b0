"""The training loop, and nothing but the loop."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, NoReturn

import attrs
import torch
from torch import Tensor

from nanochat_core.config.schema import Experiment
from nanochat_core.data.loader import Step, TrainLoader
from nanochat_core.data.packing import Cursor
from nanochat_core.distributed.signals import Stopped, StopRequest
from nanochat_core.distributed.world import OtherRankFailed, World
from nanochat_core.errors import DataError, NanochatError
from nanochat_core.evaluation.evaluate import Evaluations, EvaluationStopped
from nanochat_core.files import write_atomic
from nanochat_core.hardware.machine import peak_flops, peak_memory_mib
from nanochat_core.interfaces.loss import IGNORED
from nanochat_core.interfaces.model import Model
from nanochat_core.interfaces.optimizer import Multipliers, Optimizer
from nanochat_core.interfaces.types import Batch
from nanochat_core.loggers.run_log import Logs
from nanochat_core.planning.out_of_memory import OutOfMemory, is_out_of_memory
from nanochat_core.planning.plan import Plan
from nanochat_core.planning.schedule import lr_multiplier, warmdown_progress
from nanochat_core.plugins.choice import DataSourceKeys
from nanochat_core.runs.checkpoint import CheckpointContent, list_checkpoints, model_tensors
from nanochat_core.runs.directory import RunDirectory
from nanochat_core.runs.restore import distributions_of
from nanochat_core.runs.saver import Saver
from nanochat_core.runs.state import TrainState, restore_rng, rng_state
from nanochat_core.runs.upgrades import ModelRecord
from nanochat_core.training.diagnosis import describe_batch, summarize
from nanochat_core.training.profiler import Profiler

UNTIMED_STEPS = 10  # compilation and warm caches: not part of the training time

Status = Literal["finished", "preempted"]


class TrainingDiverged(NanochatError):
    """Too many steps in a row with a loss or gradient that is not finite."""

    exit_code = 3


@attrs.define
class Trainer:
    """One run, on this rank.

    Args:
        saver: writes checkpoints on the main rank.
        stop: tells whether this rank was asked to stop.
        heartbeat: called with what begins, once a step.
        documents: of the training split.
        data_problems: what the data source could not read so far.
        evaluated: entries that have evaluated the step the run starts at, before it was interrupted.
    """

    plan: Plan
    experiment: Experiment
    world: World
    run_dir: RunDirectory
    model: Model
    optimizer: Optimizer
    loader: TrainLoader
    evaluations: Evaluations
    state: TrainState
    logs: Logs
    saver: Saver
    stop: StopRequest
    heartbeat: Callable[[str], None]
    documents: Sequence[str]
    data_problems: Callable[[], Sequence[str]]
    evaluated: Collection[str] = ()
    _skipped_in_row: int = attrs.field(default=0, init=False)
    _steps_here: int = attrs.field(default=0, init=False)
    _known_problems: int = attrs.field(default=0, init=False)
    _data_ended: bool = attrs.field(default=False, init=False)
    _saved: int | None = attrs.field(default=None, init=False)  # step of the last checkpoint, or of the attempt

    def fit(self) -> Status:
        """Train to the horizon, or to the step at which a signal asks for a stop.

        Raises:
            TrainingDiverged: after too many skipped steps in a row.
            DataError: when the data are used up before the horizon, after saving; see ``[data] epochs``.
        """
        self._saved = self.saver.sound
        try:
            return self._loop()
        finally:
            self.saver.wait()

    def _loop(self) -> Status:
        state, horizon = self.state, self.plan.num_iterations
        save_every = self.experiment.checkpoint.save_every
        self.model.train()
        if not self._evaluate(self.evaluated):
            return self._preempted()
        with self._profiler() as profiler:
            started = time.perf_counter()
            while state.step < horizon:
                self.heartbeat(f"after step {state.step}")
                waiting = time.perf_counter()
                step = self._next_step()
                if step is None and self.world.size == 1:
                    return self._preempted()
                data_wait = time.perf_counter() - waiting
                stopping = self._train_step(step, data_wait, started, self.stop.signal is not None)
                if stopping is None:
                    return self._preempted()
                profiler.step()
                at_end = state.step == horizon
                due = save_every is not None and state.step % save_every == 0
                if at_end or stopping or self._data_ended or due:
                    self.save()
                if stopping and not at_end:
                    return self._preempted()
                if self._data_ended and not at_end:
                    self._finish_saving()
                    self.world.raise_on_main(self._data_used_up())
                if not self._evaluate():
                    return self._preempted()
                started = time.perf_counter()
        self._finish_saving()
        return "finished"

    def _next_step(self) -> Step | None:
        """The next step's data; None when a stop was asked for while this rank waited for them."""
        try:
            with self.stop.interruptible():
                return next(self.loader)
        except Stopped:
            return None

    def _preempted(self) -> Status:
        if self._saved != self.state.step:
            self.save()
        self._finish_saving()
        self.logs.report(f"stopped by a signal after step {self.state.step}, saved; run it again with --resume")
        return "preempted"

    def _finish_saving(self) -> None:
        """Until what the main rank writes is written: no rank ends before, which would end the others."""
        self.saver.wait()
        self.world.barrier()

    def _profiler(self) -> Profiler:
        steps, ahead = self.experiment.train.profile, self.plan.num_iterations - self.state.step
        directory = self.run_dir.path / "profile"
        return Profiler(directory, self.world, steps, UNTIMED_STEPS, ahead, self.logs.report)

    def _train_step(self, step: Step | None, data_wait: float, started: float, stop: bool) -> bool | None:
        """One optimizer step and its ledger line. Returns whether any rank was asked to stop; None when one was while
        it waited for data: then the step counts for nothing. Such a rank has no ``step``, but does its part of what
        ranks do together, for which others may wait already. So does one that runs out of memory.

        Raises:
            OutOfMemory: after saving what was trained before this step.
        """
        state, train = self.state, self.experiment.train
        rng, full = rng_state(self.world.device), None
        multipliers = self._multipliers()
        if self._is_scaled and step is not None:
            state.begin_loss_scale(step.batches[0].ids_BT.numel())
        loss_scale = state.loss_scale if self._is_scaled else 1.0
        loss_sum = torch.zeros((), device=self.world.device)
        tokens = 0
        batches = step.batches if step is not None else []
        is_last = not batches
        for index, batch in enumerate(batches):
            tokens += int((batch.targets_BT != IGNORED).sum())
            is_last = index == len(batches) - 1
            if is_last:
                self.optimizer.begin_reduce()
            try:
                loss_sum += self._forward_backward(batch.to(self.world.device), loss_scale)
            except OutOfMemory as error:
                full = error
                break
        if not batches or not is_last:
            self.optimizer.begin_reduce()
        norm_of_sums = self.optimizer.reduce()
        ends, lost, epoch = (step.is_last, step.cropped + step.dropped, step.epoch) if step is not None else (0, 0, 0)
        counts = torch.tensor(
            [tokens, stop, step is None, full is not None, ends, lost, epoch / self.world.size],
            dtype=self._sum_dtype,
            device=loss_sum.device,
        )
        sums = torch.cat([loss_sum.to(self._sum_dtype).reshape(1), counts])
        self.world.all_reduce(sums)
        # the one synchronisation of device and host in a step
        everything = torch.cat([sums, norm_of_sums.to(sums.dtype).reshape(1)]).tolist()
        total_loss, total_tokens, stops, without, no_memory, ends, lost, epoch, norm = everything
        if without or no_memory or step is None:
            self.optimizer.discard()
            restore_rng(rng, self.world.device)
            if no_memory:
                self._end_out_of_memory(full)
            return None
        loss_mean, norm = total_loss / total_tokens, norm / total_tokens / loss_scale
        finite = abs(loss_mean) < float("inf") and norm < float("inf")  # False for NaN too
        if finite:
            clip = min(1.0, train.grad_clip / (norm + 1e-6)) if train.grad_clip else 1.0
            self.optimizer.update(clip / total_tokens / loss_scale, multipliers)
            self._skipped_in_row = 0
        else:
            self.optimizer.discard()
            state.skipped += 1
            self._skipped_in_row += 1
        if self._is_scaled:
            state.adapt_loss_scale(finite)
        self._data_ended = ends > 0
        before = {lane: Cursor(*cursor) for lane, cursor in state.cursors.items()}
        self._finish_step(
            step, loss_mean, norm, int(total_tokens), lost, epoch, finite, multipliers.lr, data_wait, started
        )
        if self._skipped_in_row > train.max_skipped_steps:
            self._finish_saving()
            self.world.raise_on_main(self._diverged(step, before, loss_mean, norm, multipliers.lr))
        return stops > 0

    @property
    def _is_scaled(self) -> bool:
        return self.plan.dtype == "float16"

    def _forward_backward(self, batch: Batch, loss_scale: float) -> Tensor:
        """The summed loss of a micro-batch; its gradients, times ``loss_scale``, are added.

        Raises:
            OutOfMemory: parameters and moments are those of the last step.
        """
        try:
            loss = self._loss(batch.ids_BT, batch.targets_BT)
            (loss if loss_scale == 1.0 else loss * loss_scale).backward()  # type: ignore[no-untyped-call]
            return loss.detach()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            said = str(error)
        # Here the traceback is gone, and the activations with it.
        raise OutOfMemory(self.plan, f"training step {self.state.step}", said)

    def _end_out_of_memory(self, error: OutOfMemory | None) -> NoReturn:
        """Save what was trained, and end. Called on all ranks, with the error of this one."""
        if self._steps_here and self._saved != self.state.step:
            self.save()
        self._finish_saving()
        if error is None:
            self.logs.note(f"another rank is out of memory in step {self.state.step}")
            raise OtherRankFailed(OutOfMemory.exit_code)
        raise error

    def _loss(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        dtype = getattr(torch, self.plan.dtype)
        with torch.autocast(self.world.device.type, dtype=dtype, enabled=dtype is not torch.float32):
            loss: Tensor = self.model(ids_BT, targets_BT)
            return loss

    @property
    def _sum_dtype(self) -> torch.dtype:
        return torch.float32 if self.world.device.type == "mps" else torch.float64

    def _multipliers(self) -> Multipliers:
        schedule, step, steps = self.experiment.schedule, self.state.step, self.plan.num_iterations
        lr, warmdown = lr_multiplier(schedule, step, steps), warmdown_progress(schedule, step, steps)
        return Multipliers(step, steps, lr, warmdown)

    def _finish_step(
        self,
        step: Step,
        loss: float,
        norm: float,
        tokens: int,
        lost: float,
        epoch: float,
        finite: bool,
        lrm: float,
        wait: float,
        started: float,
    ) -> None:
        """Advance the state and write the step's ledger line."""
        state, plan = self.state, self.plan
        seconds = time.perf_counter() - started
        done = state.step
        state.step += 1
        state.tokens += tokens
        state.cursors = dict(step.cursors)  # of this rank; after a resume it had all, and others go on with theirs
        self._steps_here += 1
        if self._steps_here > UNTIMED_STEPS:
            state.training_time += seconds
        values: dict[str, float | str] = {"train/loss": loss}
        if finite:
            if (spike := state.spike(loss)) is not None:
                mean, values["train/loss_spike"] = spike
                self.logs.report(
                    f"step {done}: the loss spikes: {loss:.4f}, {spike[1]:.1f} standard deviations above {mean:.4f} "
                    f"(gradient norm {norm:.4g})"
                )
            values["train/loss_ema"] = state.smooth(loss)
        else:
            self.logs.report(f"step {done}: loss {loss}, gradient norm {norm}: not finite, the update is skipped")
            values["train/skipped"] = state.skipped
        if self._is_scaled:
            values["train/loss_scale"] = state.loss_scale
        peak, _ = peak_flops(self.world.device, getattr(torch, plan.dtype))
        values |= {
            "train/grad_norm": norm,
            "train/lrm": lrm,
            "train/dt": seconds,
            "train/tok_per_sec": tokens / seconds,
            "train/mfu": 100 * plan.flops_per_token * tokens / seconds / (peak * plan.world_size),
            "train/epoch": epoch,
            "train/data_wait": wait,
            "train/peak_memory": peak_memory_mib(self.world.device),
            "total_training_flops": plan.flops_per_token * state.tokens,
            "total_training_time": state.training_time,
        }
        keys = self.experiment.data.keys
        if isinstance(keys, DataSourceKeys) and keys.packing == "best_fit":
            values["train/cropped"] = lost / (lost + tokens)
        self.logs.record(done, values)
        problems = self.data_problems()
        for line in problems[self._known_problems :]:
            self.logs.report(f"skipped in the data: {line}")
        self._known_problems = len(problems)

    def _evaluate(self, done: Collection[str] = ()) -> bool:
        """Run what is due, then delete checkpoints that are not kept. Returns False when a signal cut it short."""
        state = self.state
        try:
            for name, evaluation in self.evaluations.run(self.model, state.step, done):
                state.note_minimum(evaluation.metrics)
                self.saver.note(state.step, evaluation.metrics)
                self.logs.record(state.step, {"evaluator": name, **evaluation.metrics, **evaluation.texts})
        except EvaluationStopped:
            return False
        if self.world.is_main and self._saved == state.step:
            self.saver.retain(state.step)
        return True

    def save(self) -> None:
        """Save a checkpoint of the current step. A save that fails is reported and does not stop the run."""
        state = self.state
        self._saved = state.step
        optimizer_state = self.optimizer.state_dict()  # collective
        parts = self.world.all_gather_object((dict(self.state.cursors), rng_state(self.world.device)))
        if self.world.is_main:
            for cursors, _ in parts:
                state.cursors.update(cursors)
            state.ledger_bytes = self.logs.ledger_bytes()
            rng = {f"{rank}/{name}": t for rank, (_, states) in enumerate(parts) for name, t in states.items()}
            plugins = distributions_of(self.experiment)
            built_from = ModelRecord.of(self.experiment.model)
            self.saver.save(
                CheckpointContent(model_tensors(self.model), optimizer_state, rng, state, built_from, plugins)
            )
            self.logs.status("running", state.step, self.plan.num_iterations)
        self.world.barrier()

    def _data_used_up(self) -> DataError:
        keys = self.experiment.data.keys
        assert isinstance(keys, DataSourceKeys)
        return DataError(
            f"the training data are used up after step {self.state.step} of {self.plan.num_iterations} "
            f"(epochs = {keys.epochs!r}), which is saved. To go on: --resume with more epochs, as in "
            f"--set data.epochs=repeat, or with fewer steps, as in --set train.num_iterations={self.state.step}",
            key="data.epochs",
        )

    def _diverged(
        self, step: Step, before: Mapping[int, Cursor], loss: float, norm: float, lrm: float
    ) -> TrainingDiverged:
        """Called on all ranks. The batch, row by row and with its documents, goes to a file."""
        done = self.state.step - 1
        indices = self.loader.documents(before, step)
        dtype = getattr(torch, self.plan.dtype)
        parts = self.world.all_gather_object(describe_batch(self.model, dtype, step, self.documents, indices))
        path = self.run_dir.path / f"diverged_step_{done:06d}.json"
        content = {"step": done, "loss": str(loss), "grad_norm": str(norm), "lrm": lrm, "ranks": parts}
        written = f" (see {path})"
        if self.world.is_main:
            try:
                write_atomic(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
            except OSError as error:
                written = f" ({path} can't be written: {error})"
        saved = list_checkpoints(self.run_dir.checkpoints)
        last = f"the last good checkpoint is {saved[0]}" if saved else "none was saved"
        return TrainingDiverged(
            f"{self._skipped_in_row} steps in a row had a loss or gradient that is not finite (step {done}, loss "
            f"{loss}, gradient norm {norm}, learning-rate multiplier {lrm:.3g}); {summarize(parts)}{written}; {last}. "
            f"Lower the learning rates, raise schedule.warmup_steps, or try train.dtype = float32; "
            f"see docs/troubleshooting.md"
        )
