"""The evaluator ``samples``."""

from __future__ import annotations

from nanochat_core import Evaluation, Evaluator, EvaluatorContext, Model, generate
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
        config, texts = self.config, dict[str, str]()
        for i, prompt in enumerate(config.prompts):
            texts[f"samples/{i}"] = self._complete(model, prompt, config.temperature, config.seed)
            for k in range(config.num_sampled):
                text = self._complete(model, prompt, config.sampled_temperature, config.seed + k)
                texts[f"samples/{i}/sampled/{k}"] = text
            if self.context.time_left() <= 0:
                break
        return Evaluation(texts=texts)

    def _complete(self, model: Model, prompt: str, temperature: float, seed: int) -> str:
        tokenizer = self.context.tokenizer
        new = generate(
            model,
            [tokenizer.bos_id, *tokenizer.encode(prompt)],
            max_new_tokens=self.config.max_new_tokens,
            temperature=temperature,
            top_k=self.config.top_k,
            seed=seed,
            stop=(tokenizer.bos_id,),  # start of another document
            vocab_size=tokenizer.vocab_size,
        )
        return prompt + tokenizer.decode(list(new))
