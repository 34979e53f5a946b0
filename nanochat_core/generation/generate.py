"""``generate``: the continuation of one prompt, token by token."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from nanochat_core.generation.engine import Engine
from nanochat_core.generation.request import Request
from nanochat_core.interfaces.model import Model


def generate(
    model: Model,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 42,
    stop: Collection[int] = (),
    vocab_size: int | None = None,
) -> Iterator[int]:
    """Yield the tokens that follow ``ids``, each as soon as it is known. For several prompts ``Engine`` is much faster.

    The model should be in eval mode. No gradients are recorded, and torch's global generators are not used.

    Args:
        ids, max_new_tokens, temperature, top_k, seed, stop: ``prompt``, ``max_tokens``, ``temperature``, ``top_k``,
            ``seed`` and ``stop_tokens`` of a ``Request``.
        vocab_size: number of tokens of the tokenizer; larger ids of the model's vocabulary are never sampled.

    Raises:
        NanochatError: for an empty prompt or an option out of range; raised by the call, not by the iteration.
    """
    request = Request(
        prompt=ids, max_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed, stop_tokens=stop
    )
    events = Engine(model, max_rows=1, vocab_size=vocab_size).stream(request)
    return (event.token for event in events if event.token is not None)
