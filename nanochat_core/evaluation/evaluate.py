"""Evaluations in a run: which evaluators are due at a step, and calls of them that leave training undisturbed."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import attrs
import numpy as np
import torch

from nanochat_core.distributed.guarded import STOPPED, Cancelled, EvaluationWorld
from nanochat_core.distributed.signals import Stopped
from nanochat_core.distributed.world import World
from nanochat_core.errors import NanochatError, PassesPlugins, PluginError
from nanochat_core.evaluation.contract import BadResult, checked, reserved_problem
from nanochat_core.evaluation.results import write_evaluation
from nanochat_core.evaluation.undisturbed import Undisturbed
from nanochat_core.files import first_few, write_atomic
from nanochat_core.hardware.casting import autocast, weights_at_rest
from nanochat_core.interfaces.evaluator import Evaluation, Evaluator
from nanochat_core.interfaces.model import Model
from nanochat_core.plugins.calls import describe, is_not_a_plugins, message_of
from nanochat_core.plugins.choice import Choice, EvaluatorKeys
from nanochat_core.runs.directory import RunDirectory
from nanochat_core.runs.state import restore_rng, rng_state


@contextlib.contextmanager
def inference(model: Model, dtype: torch.dtype) -> Iterator[None]:
    """Put a model into eval mode, without gradients, computing in ``dtype``, for the length of a ``with`` block.

    Afterwards the mode of each module and the random generators of torch, numpy and Python are restored, and unused
    memory of a CUDA device is freed.
    """
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    rng, numpy_rng, python_rng = rng_state(device), np.random.get_state(), random.getstate()
    model.eval()
    try:
        with torch.no_grad(), weights_at_rest(), autocast(device, dtype):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        restore_rng(rng, device)
        np.random.set_state(numpy_rng)
        random.setstate(python_rng)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # cached blocks of other shapes would fragment the memory of training


def evaluate(
    choice: Choice,
    evaluator: Evaluator,
    model: Model,
    dtype: torch.dtype,
    step: int,
    world: World,
    owners: dict[str, str] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Call an evaluator on every rank. What it returns is checked, and encoded as it will be written.

    What it leaves changed of the model and the process is put back and reported.

    Args:
        owners: entry of the experiment by name of a metric or text, for those in use; the new names are added.
        report: called with a line for the log.

    Raises:
        EvaluationFailed: on every rank, when the evaluator raised on any, or returned what it may not.
        EvaluationStopped: on every rank, when a signal asked any of them to stop.
        PluginError: when it has changed weights of the model, which can't be put back; OtherRankFailed on other ranks.
    """
    keys, names = choice.keys, owners if owners is not None else {}
    assert isinstance(keys, EvaluatorKeys)
    guard = world if isinstance(world, EvaluationWorld) else EvaluationWorld.of(world)
    guard.begin(keys.time_budget)
    problem, cause = "", None
    evaluation = Evaluation()
    with inference(model, dtype):
        undisturbed = Undisturbed(model)
        try:
            with guard.stop.interruptible(), choice.naming_options():
                evaluation = _with_names(checked(evaluator.evaluate(model, step)), choice, names)
        except Stopped:
            problem = STOPPED
        except Cancelled:
            pass
        except BaseException as error:
            if isinstance(error, PassesPlugins) or (is_not_a_plugins(error) and not isinstance(error, Exception)):
                raise
            problem, cause = _told(error), error
        finally:
            changed, lost = undisturbed.put_back()
    if changed:
        report(f"evaluator {choice.name} left changed, which was put back: {', '.join(changed)}")
    problems = guard.settle(f"{CHANGED}{first_few(lost, 3)}" if lost else problem)
    for text in problems.values():
        if text.startswith(CHANGED):
            guard.raise_on_main(PluginError(f"{choice.title} {text} (step {step}). {_REMEDY}"))
    if STOPPED in problems.values():
        raise EvaluationStopped
    if problems:
        raise EvaluationFailed(problems, guard.size) from cause
    names.update(dict.fromkeys((*evaluation.metrics, *evaluation.texts), choice.name))
    return evaluation


CHANGED = "has changed weights of the model: "  # in place of an error
_REMEDY = (
    "An evaluator must leave them as they are, and they can't be put back. Mend the evaluator or remove its entry; "
    "a run continues from its last checkpoint with --resume"
)


def _with_names(evaluation: Evaluation, choice: Choice, owners: Mapping[str, str]) -> Evaluation:
    """Return an evaluation with the names that the ledger will have. Raises BadResult for names that are not free."""
    renamed = attrs.evolve(
        evaluation,
        metrics={choice.metric_name(key): value for key, value in evaluation.metrics.items()},
        texts={choice.metric_name(key): text for key, text in evaluation.texts.items()},
    )
    for name in (*renamed.metrics, *renamed.texts):
        problem = reserved_problem(name, owners, choice.name)
        if problem:
            raise BadResult(problem)
    return renamed


def _told(error: BaseException) -> str:
    """What went wrong in an evaluator, in one line."""
    return message_of(error) if isinstance(error, BadResult | NanochatError) else describe(error)


def claimed_names(evaluators: Iterable[BuiltEvaluator]) -> dict[str, str]:
    """Return the entry by name of the metrics that entries of the experiment are known for."""
    known: dict[str, str] = {}
    for choice in (built.choice for built in evaluators):
        if choice.entry is not None and choice.entry.best_metric:
            known.setdefault(choice.metric_name(choice.entry.best_metric), choice.name)
    return known


class EvaluationStopped(Exception):
    """Error: a signal asked for a stop. Partial results are dropped, so that a resumed run repeats the evaluation."""


class EvaluationFailed(Exception):
    """Error: an evaluator raised. With several ranks the message names the rank."""

    def __init__(self, problems: dict[int, str], size: int) -> None:
        rank, text = next(iter(problems.items()))
        super().__init__(text if size == 1 else f"on rank {rank}: {text}")


@attrs.frozen
class BuiltEvaluator:
    """An entry of the experiment and the evaluator built from it.

    Args:
        data: fingerprints of the splits from which it has read rows so far; filled in on the main rank only.
    """

    choice: Choice
    evaluator: Evaluator
    data: dict[str, str] = attrs.field(factory=dict)


def evaluate_each(
    evaluators: Sequence[BuiltEvaluator],
    model: Model,
    dtype: torch.dtype,
    step: int,
    world: World,
    failed: Callable[[str, EvaluationFailed], None],
    heartbeat: Callable[[str], None] = lambda doing: None,
    owners: dict[str, str] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Iterator[tuple[BuiltEvaluator, Evaluation]]:
    """Call evaluators one by one on every rank, and yield each with its results. An evaluator that raises is skipped.

    Args:
        failed: called on every rank with the entry's name and the error of an evaluator that raised.
        heartbeat: called before each evaluation with the activity that begins.
        owners, report: see ``evaluate``.

    Raises:
        EvaluationStopped: on every rank, when a signal asked any of them to stop before or during an evaluation.
        PluginError: see ``evaluate``.
    """
    owners = claimed_names(evaluators) if owners is None else owners
    for built in evaluators:
        heartbeat(f"in evaluation {built.choice.name}")
        try:
            evaluation = evaluate(built.choice, built.evaluator, model, dtype, step, world, owners, report)
        except EvaluationFailed as error:
            failed(built.choice.name, error)
            continue
        yield built, evaluation


@attrs.frozen
class Evaluations:
    """The evaluators of a run.

    Args:
        num_iterations: optimizer steps of the run.
        dtype: dtype of matrix products.
        world: the world of the evaluators' contexts.
        directory: the run's directory. Texts are written to ``samples``, tables and examples to ``evaluations``.
        report: called with a line for the log.
        heartbeat: called before each evaluation with the activity that begins.
    """

    evaluators: tuple[BuiltEvaluator, ...]
    num_iterations: int
    dtype: torch.dtype
    world: World
    directory: Path
    report: Callable[[str], None]
    heartbeat: Callable[[str], None] = lambda doing: None
    _reported: set[str] = attrs.field(factory=set, init=False, eq=False)
    _owners: dict[str, str] = attrs.field(
        default=attrs.Factory(lambda self: claimed_names(self.evaluators), takes_self=True), init=False, eq=False
    )

    def due(self, step: int) -> list[BuiltEvaluator]:
        """Return the evaluators to call after ``step`` optimizer steps."""
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
        """Call the evaluators that are due one by one, and yield the names of their entries with their results.

        An evaluator that raises is reported, and the run continues.

        Args:
            done: names of entries to skip.

        Raises:
            EvaluationStopped: on every rank, when a signal asked any of them to stop before or during an evaluation.
        """

        def failed(name: str, error: EvaluationFailed) -> None:
            self.report(f"evaluator {name} failed at step {step}, the run continues: {error}")

        due = [built for built in self.due(step) if built.choice.name not in done]
        each = evaluate_each(
            due, model, self.dtype, step, self.world, failed, self.heartbeat, self._owners, self._report_once
        )
        for built, evaluation in each:
            name = built.choice.name
            if self.world.is_main:
                try:
                    self._keep(name, step, evaluation, built.data)
                except OSError as error:
                    self.report(f"results of evaluator {name} at step {step} can't be written: {error}")
            yield name, evaluation

    def _keep(self, name: str, step: int, evaluation: Evaluation, data: Mapping[str, str]) -> None:
        for note in evaluation.notes:
            self._report_once(f"{name}: {note}")
        if evaluation.texts:
            samples = RunDirectory(self.directory).samples
            samples.mkdir(exist_ok=True)
            path = samples / f"{name}_{step:06d}.json"
            write_atomic(path, json.dumps(dict(evaluation.texts), indent=1, ensure_ascii=False) + "\n")
        if evaluation.examples or evaluation.files:
            write_evaluation(RunDirectory(self.directory).evaluations, name, step, evaluation, {"data": dict(data)})

    def _report_once(self, line: str) -> None:
        if line not in self._reported:
            self._reported.add(line)
            self.report(line)
