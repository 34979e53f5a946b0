"""Evaluations in a run: what is due at a step, and calling evaluators so that training does not notice."""

from __future__ import annotations

import contextlib
import json
import math
import pickle
import random
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nanochat_core.config.schema import Choice, EvaluatorKeys
from nanochat_core.distributed.signals import Stopped, StopRequest
from nanochat_core.distributed.world import World
from nanochat_core.evaluation.results import write_evaluation
from nanochat_core.hardware.casting import weights_at_rest
from nanochat_core.interfaces.model import Evaluation, Evaluator, Model
from nanochat_core.runs.state import restore_rng, rng_state


@contextlib.contextmanager
def inference(model: Model, dtype: torch.dtype) -> Iterator[None]:
    """The model in eval mode, without gradients, computing in ``dtype``. Afterwards everything is as it was: the mode
    of each module, the random generators of torch, numpy and Python, and memory of the device that nobody uses is
    given back."""
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    rng, numpy_rng, python_rng = rng_state(device), np.random.get_state(), random.getstate()
    model.eval()
    try:
        autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32)
        with torch.no_grad(), weights_at_rest(), autocast:
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        restore_rng(rng, device)
        np.random.set_state(numpy_rng)
        random.setstate(python_rng)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # blocks cut for other shapes would stand in training's way


# --------------------------------------------------------------------------------------------- ranks that may fail

FAILED, FINISHED = 1, 2
STOPPED = "stopped by a signal"  # in place of an error
OPERATIONS = {"sum": 3, "all_reduce": 4, "broadcast": 5, "publish": 6, "gather": 7, "barrier": 8}


class Cancelled(Exception):
    """Another rank failed, so that this evaluation ends on all of them."""


@attrs.define
class _Turn:
    """One evaluation in progress.

    Args:
        active: an evaluator is at work.
        settled: ranks have found that it can't go on.
    """

    active: bool = False
    settled: bool = False
    deadline: float = math.inf


@attrs.frozen
class EvaluationWorld(World):
    """The ranks, as evaluators see them. Before anything is exchanged each rank says what it is about to do. When one
    has failed, or they want different things, all of them stop, where they would wait for each other forever.

    Args:
        stop: cuts an evaluation short, but not in the middle of an exchange.
    """

    stop: StopRequest = attrs.field(factory=StopRequest, eq=False)
    _turn: _Turn = attrs.field(factory=_Turn, eq=False)

    @classmethod
    def of(cls, world: World, stop: StopRequest | None = None) -> EvaluationWorld:
        return cls(world.rank, world.size, world.device, stop or StopRequest())

    def begin(self, seconds: float | None) -> None:
        """An evaluator starts, and may take so long."""
        self._turn.active, self._turn.settled = True, False
        self._turn.deadline = math.inf if seconds is None else time.monotonic() + seconds

    def time_left(self) -> float:
        """Seconds until this evaluation's time budget is used up."""
        return self._turn.deadline - time.monotonic()

    def settle(self, error: str) -> dict[int, str]:
        """The evaluator has ended here, with ``error`` unless it is empty. Returns what went wrong, by rank, the same
        on every rank; nothing if all is well."""
        with contextlib.suppress(Cancelled):
            self._agree(FAILED if error else FINISHED)
        went_wrong = self._turn.settled or bool(error)
        self._turn.active = False
        if not went_wrong:
            return {}
        errors = super().gather(error) if self.size > 1 else [error]
        if not any(errors):
            return {0: "ranks were at different points of the evaluation: each must make the same collectives"}
        return {rank: text for rank, text in enumerate(errors) if text}

    def _agree(self, code: int) -> None:
        """Raises Cancelled on all ranks unless all of them are about to do the same."""
        if not self._turn.active or self.size == 1:
            return
        if self._turn.settled:
            raise Cancelled("the evaluation has been cancelled")
        codes = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        codes[self.rank] = code
        dist.all_reduce(codes)
        if bool((codes == FAILED).any()) or len(set(codes.tolist())) > 1:
            self._turn.settled = True
            raise Cancelled("another rank failed or does something else")

    @contextlib.contextmanager
    def _together(self, operation: str) -> Iterator[None]:
        with self.stop.postponed():
            self._agree(OPERATIONS[operation])
            yield

    def sum(self, values: Sequence[float]) -> list[float]:
        with self._together("sum"):
            return super().sum(values)

    def all_reduce(self, tensor: Tensor) -> None:
        with self._together("all_reduce"):
            super().all_reduce(tensor)

    def broadcast(self, tensor: Tensor) -> None:
        with self._together("broadcast"):
            super().broadcast(tensor)

    def publish(self, value: Any = None) -> Any:
        if self.size == 1:
            return value
        data = pickle.dumps(value)  # what can't be sent fails here, before others wait for it
        with self._together("publish"):
            return pickle.loads(super().publish(data))

    def gather(self, value: Any) -> list[Any]:
        if self.size == 1:
            return [value]
        data = pickle.dumps(value)
        with self._together("gather"):
            return [pickle.loads(each) for each in super().gather(data)]

    def barrier(self) -> None:
        with self._together("barrier"):
            super().barrier()


# ------------------------------------------------------------------------------------------------------ evaluations


def evaluate(
    choice: Choice, evaluator: Evaluator, model: Model, dtype: torch.dtype, step: int, world: World
) -> Evaluation:
    """Call an evaluator on every rank.

    Raises:
        EvaluationFailed: on every rank, when it raised on any.
        EvaluationStopped: on every rank, when any was asked to stop.
    """
    keys = choice.keys
    assert isinstance(keys, EvaluatorKeys)
    guard = world if isinstance(world, EvaluationWorld) else EvaluationWorld.of(world)
    guard.begin(keys.time_budget)
    problem, cause = "", None
    evaluation = Evaluation()
    with inference(model, dtype):
        try:
            with guard.stop.interruptible():
                evaluation = evaluator.evaluate(model, step)
            _check(evaluation)
        except Stopped:
            problem = STOPPED
        except Cancelled:
            pass
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            problem, cause = f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})", error
    problems = guard.settle(problem)
    if STOPPED in problems.values():
        raise EvaluationStopped
    if problems:
        raise EvaluationFailed(problems, guard.size) from cause
    if choice.name != choice.plugin:
        evaluation = attrs.evolve(
            evaluation,
            metrics={f"{choice.name}/{key}": value for key, value in evaluation.metrics.items()},
            texts={f"{choice.name}/{key}": text for key, text in evaluation.texts.items()},
        )
    return evaluation


class EvaluationStopped(Exception):
    """A signal asked for a stop; what was found until then is dropped, so that a resumed run evaluates anew."""


class EvaluationFailed(Exception):
    """An evaluator raised; the message says on which rank, unless there is only one."""

    def __init__(self, problems: dict[int, str], size: int) -> None:
        rank, text = next(iter(problems.items()))
        super().__init__(text if size == 1 else f"on rank {rank}: {text}")


@attrs.frozen
class BuiltEvaluator:
    """An entry of the experiment and the evaluator built from it.

    Args:
        data: fingerprints of the splits whose rows it has asked for so far, on the main rank.
    """

    choice: Choice
    evaluator: Evaluator
    data: dict[str, str] = attrs.field(factory=dict)


@attrs.frozen
class Evaluations:
    """The evaluators of a run.

    Args:
        num_iterations: optimizer steps of the run.
        world: the one that the evaluators' contexts have.
        directory: of the run: texts go to ``samples``, tables and examples to ``evaluations``.
        report: called with a line for people.
        beat: called with what begins, before each evaluation.
    """

    evaluators: tuple[BuiltEvaluator, ...]
    num_iterations: int
    dtype: torch.dtype
    world: World
    directory: Path
    report: Callable[[str], None]
    beat: Callable[[str], None] = lambda doing: None
    _told: set[str] = attrs.field(factory=set, init=False, eq=False)

    def due(self, step: int) -> list[BuiltEvaluator]:
        """Evaluators to call after ``step`` optimizer steps."""
        return [built for built in self.evaluators if self._is_due(built.choice, step)]

    def _is_due(self, choice: Choice, step: int) -> bool:
        keys = choice.keys
        assert isinstance(keys, EvaluatorKeys)
        if step == 0:
            return keys.at_start
        if step == self.num_iterations:
            return keys.at_end
        return keys.every > 0 and step % keys.every == 0

    def run(self, model: Model, step: int, done: Collection[str] = ()) -> Iterator[tuple[str, Evaluation]]:
        """Call what is due, one by one, and yield the entries' names with what they found.

        An evaluator that raises is reported, and the run goes on.

        Args:
            done: names of entries to leave out.

        Raises:
            EvaluationStopped: on every rank, when any was asked to stop before or during an evaluation.
        """
        for built in self.due(step):
            choice, evaluator = built.choice, built.evaluator
            if choice.name in done:
                continue
            self.beat(f"in evaluation {choice.name}")
            try:
                evaluation = evaluate(choice, evaluator, model, self.dtype, step, self.world)
            except EvaluationFailed as error:
                self.report(f"evaluator {choice.name} failed at step {step}, the run goes on: {error}")
                continue
            if self.world.is_main:
                try:
                    self._keep(choice.name, step, evaluation, built.data)
                except OSError as error:
                    self.report(f"results of evaluator {choice.name} at step {step} can't be written: {error}")
            yield choice.name, evaluation

    def _keep(self, name: str, step: int, evaluation: Evaluation, data: Mapping[str, str]) -> None:
        for note in evaluation.notes:
            if f"{name}: {note}" not in self._told:  # once a run
                self._told.add(f"{name}: {note}")
                self.report(f"{name}: {note}")
        if evaluation.texts:
            samples = self.directory / "samples"
            samples.mkdir(exist_ok=True)
            path = samples / f"{name}_{step:06d}.json"
            path.write_text(json.dumps(dict(evaluation.texts), indent=1, ensure_ascii=False) + "\n")
        if evaluation.examples or evaluation.files:
            write_evaluation(self.directory / "evaluations", name, step, evaluation, {"data": dict(data)})


def _check(evaluation: Evaluation) -> None:
    """Raise a TypeError for what the ledger could not hold."""
    if not isinstance(evaluation, Evaluation):
        raise TypeError(f"evaluate() must return a nanochat_core.Evaluation, not {type(evaluation).__name__}")
    for name, value in evaluation.metrics.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"metric {name!r} must be a Python int or float, not {type(value).__name__}: use .item()")
    for name, text in evaluation.texts.items():
        if not isinstance(text, str):
            raise TypeError(f"text {name!r} must be a str, not {type(text).__name__}")
    taken = {"step", "time", "evaluator"} & {*evaluation.metrics, *evaluation.texts}
    if taken:
        raise TypeError(f"{', '.join(sorted(taken))} are names of the ledger: give the metric another name")
    for row in evaluation.examples:
        if not {"task", "example", "value"} <= row.keys():
            raise TypeError(f"an example needs task, example and value; this one has {', '.join(row)}")
