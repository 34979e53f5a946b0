"""Options of the evaluator ``samples``."""

import attrs

from nanochat_core import above, at_least, between, option


@attrs.frozen
class SamplesConfig:
    prompts: tuple[str, ...] = option(
        (
            "The capital of France is",
            "The chemical symbol of gold is",
            "If yesterday was Friday, then tomorrow will be",
            "The opposite of hot is",
            "The planets of the solar system are:",
            "My favorite color is",
            "If 5*x + 3 = 13, then x is",
        ),
        "texts to continue, each as the start of a document",
    )
    max_new_tokens: int = option(16, "most new tokens; fewer where the document ends", validator=at_least(1))
    temperature: float = option(0.0, "softmax temperature; 0 takes the likeliest token", validator=at_least(0))
    top_k: int | None = option(None, "sample among so many likeliest tokens; absent: among all", validator=at_least(1))
    num_sampled: int = option(
        0, "continuations of each prompt to sample besides, at sampled_temperature", validator=at_least(0)
    )
    sampled_temperature: float = option(0.8, "temperature of those", validator=above(0))
    seed: int = option(42, "seed of the sampling, the same for each prompt", validator=between(0, 2**63 - 1))
