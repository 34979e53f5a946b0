"""Sampling: continuation of a sequence, one token at a time, with a KV cache if the model has one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from nanochat_core.errors import NanochatError
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
    """Sample the tokens that follow ``ids``, and yield each as soon as it is known.

    The model should be in eval mode. No gradients are recorded, and torch's global generators are not used.

    Args:
        model: the model; only the logits of the last position are computed.
        ids: the prompt, at least one token; a new document begins with bos.
        max_new_tokens: maximum number of tokens to yield.
        temperature: divisor of the logits before the softmax; 0 takes the most likely token every time.
        top_k: sample among the ``top_k`` most likely tokens; None: among all. Without effect at temperature 0.
        seed: seed of a generator on the CPU, so that the draws are the same on every kind of device.
        stop: tokens that end the text; they are not yielded.
        vocab_size: number of tokens of the tokenizer; larger ids of the model's vocabulary are never sampled.

    Raises:
        NanochatError: for an empty prompt or an option out of range; raised by the call, not by the iteration.
    """
    if not ids:
        raise NanochatError("there is nothing to continue: give at least one token, such as the tokenizer's bos_id")
    if not temperature >= 0:  # also NaN
        raise NanochatError(f"temperature must be at least 0, not {temperature}")
    if top_k is not None and top_k < 1:
        raise NanochatError(f"top_k must be at least 1, not {top_k}: leave it out to sample among all tokens")
    return _tokens(model, list(ids), max_new_tokens, temperature, top_k, seed, frozenset(stop), vocab_size)


def _tokens(
    model: Model,
    ids: list[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    stop: frozenset[int],
    vocab_size: int | None,
) -> Iterator[int]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    cache = model.new_cache(1, len(ids) + max_new_tokens) if max_new_tokens > 0 else None
    unread = ids
    for _ in range(max_new_tokens):
        # Gradients are disabled around the computation only: around the yield they would be disabled for the caller.
        # inference_mode is not used, since a table that the model creates lazily in here may later serve training.
        with torch.no_grad():
            ids_BT = torch.tensor([unread], device=device)
            logits_V = model.logits(model.hidden(ids_BT, cache)[:, -1])[0, :vocab_size]
            if not torch.isfinite(logits_V.max()):  # neither a NaN nor, where a model rules tokens out, all of them
                raise NanochatError(
                    "the model gives no finite logits, since its weights are not finite: take an earlier checkpoint"
                )
            token = _pick(logits_V.float().cpu(), temperature, top_k, generator)
        if token in stop:
            return
        yield token
        unread = [token] if cache is not None else [*unread, token]


def _pick(logits_V: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    if temperature < torch.finfo(torch.float32).tiny:  # it would be 0 as a float32
        return int(logits_V.argmax())
    best_K, ids_K = logits_V.topk(min(top_k or len(logits_V), len(logits_V)))
    # The largest logit is subtracted first, so that a tiny temperature can't overflow.
    chosen = torch.multinomial(((best_K - best_K[0]) / temperature).softmax(-1), 1, generator=generator)
    return int(ids_K[chosen])
