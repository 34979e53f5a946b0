"""The choice of the next token of many sequences at once, each by its own parameters and its own draws.

N sequences, V tokens, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanochat_core.errors import NanochatError
from nanochat_core.generation.request import Request


class Sampler:
    """Chooses tokens for sequences of the given requests, in this order."""

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

        drawn = [request for request in requests if request.temperature > 0]
        self.draws = bool(drawn)
        self._greedy_N = torch.tensor([not request.temperature for request in requests], device=device)
        self._any_greedy = len(drawn) < len(requests)
        # A float32 of a smaller temperature would be zero.
        self._temperature_N1 = column(
            [max(request.temperature, 1e-30) if request.temperature else 1 for request in requests]
        )
        self._top_k = [request.top_k for request in drawn if request.top_k is not None]
        self._all_top_k = len(self._top_k) == len(drawn)
        self._top_k_N1 = column([request.top_k or 2**30 for request in requests])
        self._top_p_N1 = column([request.top_p for request in requests])
        self._any_top_p = any(request.top_p < 1 for request in drawn)
        self._min_p_N1 = column([request.min_p for request in requests])
        self._any_min_p = any(request.min_p > 0 for request in drawn)
        self._penalty_N1 = column([request.repetition_penalty for request in requests])
        self.penalizes = any(request.repetition_penalty != 1 for request in requests)

    def pick(self, logits_NV: Tensor, draws_N: Sequence[float], seen_NV: Tensor | None = None) -> Tensor:
        """Return the chosen tokens, int64 [N].

        Args:
            logits_NV: float32.
            draws_N: a number in [0, 1) for each sequence; of no effect at temperature 0.
            seen_NV: which tokens the texts already have; None: no request has a repetition penalty.

        Raises:
            NanochatError: when logits are NaN, or where a model rules tokens out, all of a sequence are -inf.
        """
        if not torch.isfinite(logits_NV.amax(-1)).all():
            raise NanochatError(
                "the model gives no finite logits, since its weights are not finite: take an earlier checkpoint"
            )
        if seen_NV is not None:
            penalized_NV = torch.where(logits_NV > 0, logits_NV / self._penalty_N1, logits_NV * self._penalty_N1)
            logits_NV = torch.where(seen_NV, penalized_NV, logits_NV)
        if not self.draws:
            return logits_NV.argmax(-1)
        drawn_N = self._draw(logits_NV, torch.tensor(draws_N, dtype=torch.float64, device=logits_NV.device)[:, None])
        return torch.where(self._greedy_N, logits_NV.argmax(-1), drawn_N) if self._any_greedy else drawn_N

    def _draw(self, logits_NV: Tensor, draws_N1: Tensor) -> Tensor:
        ids_NK: Tensor | None = None
        if self._all_top_k:
            z_NK, ids_NK = logits_NV.topk(min(max(self._top_k), logits_NV.shape[1]))
        elif self._top_k or self._any_top_p:
            z_NK, ids_NK = logits_NV.sort(dim=-1, descending=True, stable=True)
        else:
            z_NK = logits_NV
        # The largest is subtracted first, so that a tiny temperature can't overflow.
        best_N1 = z_NK.amax(-1, keepdim=True) if ids_NK is None else z_NK[:, :1]
        z_NK = (z_NK - best_N1) / self._temperature_N1
        if self._top_k:
            beyond_NK = torch.arange(z_NK.shape[1], device=z_NK.device) >= self._top_k_N1
            z_NK = z_NK.masked_fill(beyond_NK, -torch.inf)
        p_NK = z_NK.softmax(-1, dtype=torch.float32)
        if self._any_top_p:
            before_NK = p_NK.cumsum(-1, dtype=torch.float64) - p_NK
            p_NK = p_NK.masked_fill(before_NK >= self._top_p_N1, 0)
        if self._any_min_p:
            p_NK = p_NK.masked_fill(p_NK < self._min_p_N1 * p_NK.amax(-1, keepdim=True), 0)
        # In the order of the ids, so that what a draw means does not depend on how the candidates were found.
        if ids_NK is not None and self._all_top_k:
            ids_NK, order_NK = ids_NK.sort(-1)
            p_NK = p_NK.gather(1, order_NK)
        elif ids_NK is not None:
            p_NK, ids_NK = torch.zeros_like(p_NK).scatter(1, ids_NK, p_NK), None
        # The first token at which the sum of the probabilities exceeds the draw; in float64, because they are many.
        sums_NK = p_NK.cumsum(-1, dtype=torch.float64)
        total_N1 = sums_NK[:, -1:]
        below_N1 = torch.minimum(draws_N1 * total_N1, torch.nextafter(total_N1, torch.zeros_like(total_N1)))
        chosen_N1 = torch.searchsorted(sums_NK, below_N1, right=True)
        return (chosen_N1 if ids_NK is None else ids_NK.gather(1, chosen_N1))[:, 0]
