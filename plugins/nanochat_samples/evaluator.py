"""The evaluator ``samples``."""

from __future__ import annotations

import math

from nanochat_core import Engine, Evaluation, Evaluator, EvaluatorContext, Model, Request
from nanochat_samples.config import SamplesConfig


class Samples(Evaluator):
    """Evaluator that continues prompts, on rank 0.

    Its texts are each prompt with its continuation (``samples/0``, ``samples/1``, ...) and additional sampled
    continuations (``samples/0/sampled/0``, ...).
    """

    def __init__(self, config: SamplesConfig, context: EvaluatorContext) -> None:
        self.config = config
        self.context = context

    def evaluate(self, model: Model, step: int) -> Evaluation:
        if not self.context.world.is_main:
            return Evaluation()
        config, tokenizer = self.config, self.context.tokenizer
        engine = Engine(model, tokenizer)
        texts = dict[str, str]()
        # All at once, or one after the other where time may run out.
        step = len(config.prompts) if math.isinf(self.context.time_left()) else 1
        for start in range(0, len(config.prompts), max(step, 1)):
            prompts = config.prompts[start : start + step]
            asked = [self._request(prompt, config.temperature, 1) for prompt in prompts]
            if config.num_sampled:
                asked += [self._request(prompt, config.sampled_temperature, config.num_sampled) for prompt in prompts]
            found = engine.complete(asked)
            for i, prompt in enumerate(prompts):
                name = f"samples/{start + i}"
                texts[name] = prompt + found[i][0].text
                for k, completion in enumerate(found[len(prompts) + i] if config.num_sampled else []):
                    texts[f"{name}/sampled/{k}"] = prompt + completion.text
            if self.context.time_left() <= 0:
                break
        return Evaluation(texts=texts)

    def _request(self, prompt: str, temperature: float, samples: int) -> Request:
        tokenizer, config = self.context.tokenizer, self.config
        return Request(
            prompt=[tokenizer.bos_id, *tokenizer.encode(prompt)],
            max_tokens=config.max_new_tokens,
            temperature=temperature,
            top_k=config.top_k,
            seed=config.seed,
            stop_tokens=(tokenizer.bos_id,),  # start of another document
            samples=samples,
        )
