"""The evaluator ``bpb``: bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from nanochat_bpb.config import BpbConfig
from nanochat_bpb.texts import rows_of, tokens_of
from nanochat_core import Batch, DataError, Evaluation, Evaluator, EvaluatorContext, Model, Split, Tokens


class BitsPerByte(Evaluator):
    """Bits per byte: cross-entropy of the targets in nats / (ln 2 x bytes of the targets).

    Special tokens and ignored targets have no bytes; their cross-entropy does not count.
    """

    def __init__(self, config: BpbConfig, context: EvaluatorContext) -> None:
        self.config = config
        self.context = context
        self.bytes_V = torch.tensor(context.tokenizer.token_bytes(), dtype=torch.int64, device=context.world.device)
        self._tokens: dict[str, Tokens] = {}

    def evaluate(self, model: Model, step: int) -> Evaluation:
        """Measure ``val/bpb``, ``train/bpb`` and ``<set>/bpb``; a metric that time ran out for is ``.../bpb_partial``.

        Raises:
            DataError: when a split or set has no byte to predict on any rank, or a set can't be read.
        """
        splits = {"both": ("val", "train"), "none": ()}.get(self.config.split, (self.config.split,))
        metrics: dict[str, float] = {}
        for split in splits:
            metrics |= self._measure(model, split, self.context.rows(cast(Split, split), self.config.eval_tokens))
        for chosen in self.config.sets:
            if chosen.name not in self._tokens:
                self._tokens[chosen.name] = tokens_of(chosen, self.context, self.config.eval_tokens)
            metrics |= self._measure(model, chosen.name, rows_of(self._tokens[chosen.name], self.context))
        return Evaluation(metrics)

    def _measure(self, model: Model, name: str, batches: Iterator[Batch]) -> dict[str, float]:
        nats: list[Tensor] = []  # one number per batch, left on the device so that the loop does not wait for it
        n_bytes: list[Tensor] = []
        stopped = False
        for batch in batches:
            stopped = self.context.time_left() <= 0
            if stopped:
                break
            losses_BT = model(batch.ids_BT, batch.targets_BT, reduction="none")
            bytes_BT = self.bytes_V[batch.targets_BT.clamp(min=0)].masked_fill(batch.targets_BT < 0, 0)
            nats.append(losses_BT.masked_fill(bytes_BT == 0, 0).sum())
            n_bytes.append(bytes_BT.sum())
        own = [math.fsum(torch.stack(nats).tolist()), sum(torch.stack(n_bytes).tolist())] if nats else [0.0, 0.0]
        total_nats, total_bytes, stops = self.context.world.sum([*own, float(stopped)])
        if stops and total_bytes == 0:
            return {}
        if total_bytes == 0:
            if name not in ("val", "train"):
                raise DataError(f"the set {name} has no byte to predict: give it more text", key="sets")
            raise DataError(
                f"the {name} split has no byte to predict: give the data source documents for it, or choose "
                f"the other split",
                key="split",
            )
        return {f"{name}/bpb{'_partial' if stops else ''}": total_nats / (math.log(2) * total_bytes)}
