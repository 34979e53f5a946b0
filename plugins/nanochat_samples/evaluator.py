"""Samples for people to read."""

from __future__ import annotations

from nanochat_core import Evaluation, Evaluator, EvaluatorContext, Model, generate
from nanochat_samples.config import SamplesConfig


class Samples(Evaluator):
    """Texts ``samples/0``, ``samples/1``, ...: each prompt with its continuation. Rank 0 writes them alone."""

    def __init__(self, config: SamplesConfig, context: EvaluatorContext) -> None:
        self.config = config
        self.context = context

    def evaluate(self, model: Model, step: int) -> Evaluation:
        if not self.context.world.is_main:
            return Evaluation()
        return Evaluation(texts={f"samples/{i}": self._complete(model, p) for i, p in enumerate(self.config.prompts)})

    def _complete(self, model: Model, prompt: str) -> str:
        tokenizer = self.context.tokenizer
        new = generate(
            model,
            [tokenizer.bos_id, *tokenizer.encode(prompt)],
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            top_k=self.config.top_k,
            seed=self.config.seed,
            stop=(tokenizer.bos_id,),  # the next document would start
            vocab_size=tokenizer.vocab_size,
        )
        return prompt + tokenizer.decode(list(new))
