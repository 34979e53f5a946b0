"""Options of the evaluator ``samples``."""

import attrs

from nanochat_core import above, at_least, between, option


@attrs.frozen
class SamplesConfig:
    """Options of ``samples``."""

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
    max_new_tokens: int = option(
        16, "largest number of new tokens; fewer if the document ends", validator=at_least(1, 10**6)
    )
    temperature: float = option(0.0, "softmax temperature; 0 takes the most likely token", validator=at_least(0, 1e6))
    top_k: int | None = option(
        None, "sample among this many most likely tokens; default: among all", validator=at_least(1, 2**24)
    )
    num_sampled: int = option(
        0,
        "number of additional continuations of each prompt, sampled at sampled_temperature",
        validator=at_least(0, 1000),
    )
    sampled_temperature: float = option(0.8, "temperature of the additional continuations", validator=above(0, 1e6))
    seed: int = option(42, "seed of sampling, equal for all prompts", validator=between(0, 2**63 - 1))
