"""The evaluator ``core``: tasks of a bundle, scored one after the other."""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from nanochat_core import (
    ConfigError,
    Evaluation,
    Evaluator,
    EvaluatorContext,
    Model,
    Span,
    cache_dir,
    cropped_span,
    is_close_call,
    pick_choice,
    score_spans,
)
from nanochat_dclm_core.bundle import CORE_TASKS, Bundle, Task, open_bundle
from nanochat_dclm_core.config import CoreConfig
from nanochat_dclm_core.partial import PartialResults, weights_digest
from nanochat_dclm_core.prompts import chosen_examples, prompts, shots, spans

SCORING = 1  # version of the scoring; partial results of other versions are not used
UNLIMITED = 10  # training lengths: rotary positions work to about this length
MAX_KEPT_TOKENS = 2**25  # tokens kept between evaluations, 128 MiB
CLOSE_MARGIN = 1e-4


@attrs.frozen
class Question:
    """One example, ready to be scored.

    Args:
        key: hash of its texts.
        spans: tokens to score, one span per choice; one span for language modeling.
        gold: index of the right choice; 0 for language modeling.
        cropped: whether the beginning of a prompt was cut off.
    """

    key: str
    spans: list[Span]
    gold: int
    cropped: bool


class Core(Evaluator):
    """Evaluator of the CORE metric.

    Metrics are ``core/<task>`` (centered) and their mean: ``core_metric`` when all 22 tasks of CORE were evaluated,
    otherwise ``core/partial_mean``.
    """

    def __init__(self, config: CoreConfig, context: EvaluatorContext) -> None:
        self.config, self.context = config, context
        self.max_len = context.max_seq_len * (UNLIMITED if config.max_len == "unlimited" else 1)
        self._bundle: Bundle | None = None
        self._questions: dict[str, list[Question]] = {}
        self._digests: dict[str, str] = {}

    def evaluate(self, model: Model, step: int) -> Evaluation:
        """Evaluate the chosen tasks, without those that an interrupted evaluation of the same weights has finished.

        Raises:
            DataError: when the bundle can't be read or downloaded.
            ConfigError: when ``tasks`` names a task that is not in the bundle.
        """
        world = self.context.world
        if self._bundle is None:
            world.on_main(self._check_bundle)
            self._bundle = open_bundle(self.config.bundle, cache_dir())
        if model.max_positions is not None and model.max_positions < self.max_len:
            self.max_len = model.max_positions
            self._questions.clear()
        tasks = self._chosen(self._bundle)
        partial = PartialResults(self.context.directory, self._facts(model, step)) if world.is_main else None
        finished: dict[str, list[dict[str, Any]]] = world.on_main(lambda: partial.read() if partial else {})
        examples: list[dict[str, Any]] = []
        close: dict[str, int] = {}
        unfinished = []
        for number, task in enumerate(tasks, start=1):
            rows = finished.get(task.label)
            if rows is None:
                rows = self._score(model, task, f"{task.label} ({number}/{len(tasks)})")
                if rows is None:
                    unfinished.append(task.label)
                    continue
                if partial is not None:
                    partial.write(task.label, rows)
            close[task.label] = sum(row["close"] for row in rows)
            examples += rows
        if partial is not None and not unfinished:
            partial.remove()
        return self._report(tasks, examples, close, unfinished)

    def _check_bundle(self) -> None:
        """Download the bundle if necessary and check it, on one rank."""
        open_bundle(self.config.bundle, cache_dir())

    def _chosen(self, bundle: Bundle) -> list[Task]:
        known = {task.label: task for task in bundle.tasks}
        unknown = [label for label in self.config.tasks if label not in known]
        if unknown:
            raise ConfigError(f"{', '.join(unknown)} not in the bundle; its tasks are {', '.join(known)}", key="tasks")
        return [task for task in bundle.tasks if not self.config.tasks or task.label in self.config.tasks]

    def _facts(self, model: Model, step: int) -> dict[str, Any]:
        """Everything that partial results depend on."""
        assert self._bundle is not None
        return {
            "scoring": SCORING,
            "step": step,
            "bundle": self._bundle.digest,
            "max_per_task": self.config.max_per_task,
            "max_len": self.max_len,
            "tokenizer": self.context.tokenizer.fingerprint,
            "weights": weights_digest(model),
        }

    # -- one task

    def _score(self, model: Model, task: Task, title: str) -> list[dict[str, Any]] | None:
        """Rows of a task's examples; None when time ran out."""
        if task.label not in self._questions and self.context.world.sum([self.context.time_left() <= 0])[0]:
            return None  # it would not be scored, so it is not prepared
        questions = self._prepare(task)
        is_text = task.type == "language_modeling"
        scores = score_spans(
            model,
            [question.spans for question in questions],
            self.context,
            greedy=is_text,
            batch_tokens=None if self.config.batch_tokens == "auto" else self.config.batch_tokens,
            partial=True,
            title=title,
        )
        if any(math.isnan(score.nats) for choices in scores for score in choices):
            return None
        rows = []
        for question, choices in zip(questions, scores, strict=True):
            losses = [score.mean for score in choices]
            if is_text:
                chosen, right, close = -1, choices[0].greedy, abs(choices[0].margin) < CLOSE_MARGIN
            else:
                chosen = pick_choice(losses)
                right, close = chosen == question.gold, is_close_call(losses)
            value = float(right)
            rows.append(
                {
                    "task": task.label,
                    "example": question.key,
                    "value": value,
                    "centered": centered(value, task.baseline),
                    "scores": losses,
                    "chosen": chosen,
                    "gold": question.gold,
                    "close": close,
                    "cropped": question.cropped,
                }
            )
        return rows

    def _prepare(self, task: Task) -> list[Question]:
        """The task's questions as tokens, kept for the next evaluation while all together are few."""
        known = self._questions.get(task.label)
        if known is not None:
            return known
        assert self._bundle is not None
        everything, digest = self._bundle.examples(task)
        self._digests[task.label] = digest
        examples = chosen_examples(everything, self.config.max_per_task)
        questions = []
        for index, example in enumerate(examples):
            texts = prompts(task, example, shots(examples, index, task.shots))
            whole = spans(task.type, texts, self.context.tokenizer)
            cropped = any(len(span.ids) > self.max_len for span in whole)
            cropped_spans = [cropped_span(span.ids, span.start, self.max_len) for span in whole]
            key = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:16]
            questions.append(Question(key, cropped_spans, example.get("gold", 0), cropped))
        kept = sum(len(s.ids) for qs in (*self._questions.values(), questions) for q in qs for s in q.spans)
        if kept <= MAX_KEPT_TOKENS:
            self._questions[task.label] = questions
        return questions

    # -- all tasks

    def _report(
        self, tasks: Sequence[Task], rows: list[dict[str, Any]], close: Mapping[str, int], unfinished: list[str]
    ) -> Evaluation:
        """Build the evaluation from the rows of all finished tasks."""
        by_task: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            by_task.setdefault(row["task"], []).append(row)
        scored = [task for task in tasks if task.label in by_task]
        accuracies = {t.label: sum(row["value"] for row in by_task[t.label]) / len(by_task[t.label]) for t in scored}
        scores = {task.label: centered(accuracies[task.label], task.baseline) for task in scored}
        metrics = {f"core/{label}": score for label, score in scores.items()}
        if scores:
            mean_name, mean = aggregate(scores)
            metrics[mean_name] = mean
        assert self._bundle is not None
        facts = {
            "bundle": self._bundle.source,
            "accuracy": accuracies,
            "examples": {label: len(by_task[label]) for label in scores},
            "close": dict(close),
            "cropped": {label: sum(row["cropped"] for row in by_task[label]) for label in scores},
            **self._absent(tasks, unfinished),
            "task_digests": dict(self._digests),
        }
        files = {"core.csv": table(accuracies, scores)} if scores else {}
        settings = self._settings()
        notes = self._notes({**facts, **settings})
        return Evaluation(metrics=metrics, examples=rows, files=files, facts=facts, settings=settings, notes=notes)

    def _settings(self) -> dict[str, Any]:
        assert self._bundle is not None
        return {
            "baselines": self._bundle.baselines_version,
            "bundle_digest": self._bundle.digest,
            "max_per_task": self.config.max_per_task,
            "max_len": self.max_len,
        }

    def _absent(self, tasks: Sequence[Task], unfinished: list[str]) -> dict[str, list[str]]:
        """Tasks without a score, by the reason."""
        assert self._bundle is not None
        return {
            "missing_tasks": [label for label in self._bundle.missing() if label not in unfinished],
            "left_out_tasks": [task.label for task in self._bundle.tasks if task not in tasks],
            "unfinished_tasks": unfinished,
        }

    def _notes(self, facts: Mapping[str, Any]) -> tuple[str, ...]:
        notes = []
        if facts["missing_tasks"]:
            missing = facts["missing_tasks"]
            notes.append(f"{len(missing)} of CORE's 22 tasks are not in the bundle: {', '.join(missing)}")
        if facts["left_out_tasks"]:
            notes.append(f"tasks that the option tasks does not name: {', '.join(facts['left_out_tasks'])}")
        if facts["unfinished_tasks"]:
            notes.append(f"time_budget ended before: {', '.join(facts['unfinished_tasks'])}")
        if facts["missing_tasks"] or facts["left_out_tasks"] or facts["unfinished_tasks"]:
            notes.append(
                "core/partial_mean is a mean over some tasks: don't compare it with CORE or means of other tasks"
            )
        close, cropped = sum(facts["close"].values()), sum(facts["cropped"].values())
        if close:
            notes.append(
                f"{close} examples were decided by less than {CLOSE_MARGIN:g}: results on other machines may differ"
            )
        if cropped:
            notes.append(f"{cropped} prompts were longer than {self.max_len} tokens; only their end was used")
        notes.append(f"random baselines: {facts['baselines']}")
        return tuple(notes)


def centered(accuracy: float, baseline: float) -> float:
    """Accuracy in [0, 1], rescaled to 0 for guessing and 1 for always right. ``baseline`` is in percent."""
    return (accuracy - 0.01 * baseline) / (1.0 - 0.01 * baseline)


def aggregate(scores: Mapping[str, float]) -> tuple[str, float]:
    """Name and value of the mean of centered accuracies: ``core_metric`` for all 22 tasks of CORE."""
    name = "core_metric" if set(scores) == set(CORE_TASKS) else "core/partial_mean"
    return name, sum(scores.values()) / len(scores) if scores else math.nan


def table(accuracies: Mapping[str, float], scores: Mapping[str, float]) -> str:
    """CSV with the columns Task, Accuracy and Centered, and the mean in the last row."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["Task", "Accuracy", "Centered"])
    for label, accuracy in accuracies.items():
        writer.writerow([label, f"{accuracy:.6f}", f"{scores[label]:.6f}"])
    name, mean = aggregate(scores)
    writer.writerow(["CORE" if name == "core_metric" else "partial mean", "", f"{mean:.6f}"])
    return text.getvalue()
