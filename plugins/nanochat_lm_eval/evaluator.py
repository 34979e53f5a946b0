"""The evaluator ``lm_eval``: tasks of the lm-evaluation-harness, run on our model.

The harness runs on rank 0. Its requests for likelihoods are sent to all ranks, which share the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lm_eval
import numpy as np
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from nanochat_core import (
    ConfigError,
    Engine,
    Evaluation,
    Evaluator,
    EvaluatorContext,
    Model,
    Request,
    Span,
    cropped_span,
    score_spans,
)
from nanochat_lm_eval.config import LMEvalConfig


class HarnessModel(LM):  # type: ignore[misc]
    """The harness's interface to our model, on rank 0."""

    def __init__(self, model: Model, context: EvaluatorContext) -> None:
        super().__init__()
        self.model, self.context = model, context
        self.max_len = model.max_positions or 10 * context.max_seq_len

    @property
    def tokenizer_name(self) -> str:
        return self.context.tokenizer.fingerprint[:16]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether greedy decoding gives it."""
        tokenizer = self.context.tokenizer
        spans = []
        for before, after in (request.args for request in requests):
            # Spaces at the end of the context belong to the continuation's first token.
            spaces = len(before) - len(before.rstrip())
            if spaces:
                before, after = before[:-spaces], before[-spaces:] + after
            head = [tokenizer.bos_id, *tokenizer.encode(before)]
            whole = [tokenizer.bos_id, *tokenizer.encode(before + after)]
            start = min(len(head), len(whole) - 1)
            spans.append(cropped_span(np.array(whole, dtype=np.int32), max(start, 1), self.max_len))
        return [(-score.nats, score.greedy) for score in self._score(spans)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-probability of whole texts after bos, in windows of the maximum length; each token is scored once."""
        tokenizer, results = self.context.tokenizer, []
        spans: list[Span] = []
        counts = []
        for (text,) in (request.args for request in requests):
            ids = np.array([tokenizer.bos_id, *tokenizer.encode(text)], dtype=np.int32)
            windows = [ids[i : i + self.max_len] for i in range(0, max(len(ids) - 1, 1), self.max_len - 1)]
            windows = [window for window in windows if len(window) > 1]
            spans += [Span(window, 1) for window in windows]
            counts.append(len(windows))
        scores = iter(self._score(spans))
        for count in counts:
            results.append(-sum(next(scores).nats for _ in range(count)))
        return results

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Continuations up to a stop string: greedy, or sampled if the task has do_sample."""
        tokenizer, asked = self.context.tokenizer, []
        for prompt, options in (request.args for request in requests):
            until = options.get("until") or []
            until = [until] if isinstance(until, str) else list(until)
            limit = int(options.get("max_gen_toks", 256))
            asked.append(
                Request(
                    prompt=[tokenizer.bos_id, *tokenizer.encode(prompt)][-max(self.max_len - limit, 1) :],
                    max_tokens=limit,
                    temperature=float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0,
                    stop_tokens=(tokenizer.bos_id,),
                    stop=[text for text in until if text],
                )
            )
        # Prompts of a task often begin with the same examples.
        engine = Engine(self.model, tokenizer, context=self.max_len, prefix_tokens=self.max_len)
        return [completion.text for (completion,) in engine.complete(asked)]

    def _score(self, spans: list[Span]) -> list[Any]:
        self.context.world.broadcast_object(("score", [(span.ids, span.start) for span in spans]))
        return _scores(self.model, spans, self.context)


def _scores(model: Model, spans: list[Span], context: EvaluatorContext) -> list[Any]:
    return [score for (score,) in score_spans(model, [[span] for span in spans], context, greedy=True, title="lm_eval")]


class LMEval(Evaluator):
    """Evaluator whose metrics are ``lm_eval/<task>/<metric>``."""

    def __init__(self, config: LMEvalConfig, context: EvaluatorContext) -> None:
        self.config, self.context = config, context

    def evaluate(self, model: Model, step: int) -> Evaluation:
        """Run the tasks.

        Raises:
            ConfigError: when the harness does not have a task.
        """
        world = self.context.world
        if not world.is_main:
            while True:
                request, spans = world.broadcast_object()
                if request == "done":
                    return Evaluation()
                _scores(model, [Span(ids, start) for ids, start in spans], self.context)
        evaluation = self._run(model)
        world.broadcast_object(("done", []))
        return evaluation

    def _run(self, model: Model) -> Evaluation:
        config = self.config
        manager = TaskManager(include_path=str(config.include_path) if config.include_path is not None else None)
        unknown = [name for name in config.tasks if not manager.match_tasks([name])]
        if unknown:
            raise ConfigError(
                f"the harness has no {', '.join(unknown)}; `lm_eval ls tasks` prints its tasks", key="tasks"
            )
        results = lm_eval.simple_evaluate(
            model=HarnessModel(model, self.context),
            tasks=list(config.tasks),
            num_fewshot=config.num_fewshot,
            limit=config.limit,
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=0,
            random_seed=config.seed,
            numpy_random_seed=config.seed,
            torch_random_seed=config.seed,
            fewshot_random_seed=config.seed,
        )
        metrics, examples = {}, []
        for task, values in results["results"].items():
            for name, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool) and "stderr" not in name:
                    metrics[f"lm_eval/{task}/{name.removesuffix(',none')}"] = float(value)
        for task, samples in results.get("samples", {}).items():
            for sample in samples:
                value = next((sample[m] for m in sample.get("metrics", []) if isinstance(sample[m], int | float)), None)
                if value is not None:
                    examples.append({"task": task, "example": sample["doc_hash"][:16], "value": float(value)})
        facts = {"versions": results.get("versions", {}), "n-samples": results.get("n-samples", {})}
        return Evaluation(metrics=metrics, examples=examples, facts=facts)
