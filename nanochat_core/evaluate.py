"""Evaluations in a run: what is due at a step, and calling evaluators so that training does not notice."""

from __future__ import annotations

import contextlib
import json
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import attrs
import torch

from nanochat_core.distributed import World
from nanochat_core.interfaces import Evaluation, Evaluator, Model
from nanochat_core.schema import Choice, EvaluatorKeys
from nanochat_core.state import restore_rng, rng_state


@contextlib.contextmanager
def inference(model: Model, dtype: torch.dtype) -> Iterator[None]:
    """The model in eval mode, without gradients, computing in ``dtype``; mode and RNG are restored."""
    device = next(model.parameters()).device
    mode, rng = model.training, rng_state(device)
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
            yield
    finally:
        model.train(mode)
        restore_rng(rng, device)


@attrs.frozen
class Evaluations:
    """The evaluators of a run.

    Args:
        evaluators: the experiment's entries with the evaluators built from them.
        num_iterations: optimizer steps of the run.
        samples_dir: where texts go.
        report: called with a line for people when an evaluator fails.
    """

    evaluators: tuple[tuple[Choice, Evaluator], ...]
    num_iterations: int
    dtype: torch.dtype
    world: World
    samples_dir: Path
    report: Callable[[str], None]

    def due(self, step: int) -> list[tuple[Choice, Evaluator]]:
        """Evaluators to call after ``step`` optimizer steps."""
        return [(choice, evaluator) for choice, evaluator in self.evaluators if self._is_due(choice, step)]

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
        """
        for choice, evaluator in self.due(step):
            if choice.name in done:
                continue
            with inference(model, self.dtype):
                try:
                    evaluation = evaluator.evaluate(model, step)
                    _check(evaluation)
                except Exception as error:
                    last = traceback.extract_tb(error.__traceback__)[-1]
                    self.report(
                        f"evaluator {choice.name} failed at step {step}, the run goes on: "
                        f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
                    )
                    continue
            if choice.name != choice.plugin:
                metrics = {f"{choice.name}/{key}": value for key, value in evaluation.metrics.items()}
                texts = {f"{choice.name}/{key}": text for key, text in evaluation.texts.items()}
                evaluation = Evaluation(metrics, texts)
            if evaluation.texts and self.world.is_main:
                self.samples_dir.mkdir(exist_ok=True)
                path = self.samples_dir / f"{choice.name}_{step:06d}.json"
                path.write_text(json.dumps(dict(evaluation.texts), indent=1, ensure_ascii=False) + "\n")
            yield choice.name, evaluation


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
