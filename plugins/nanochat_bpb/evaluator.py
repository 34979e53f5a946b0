"""Bits per byte."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nanochat_bpb.config import BpbConfig
from nanochat_core import DataError, Evaluation, Evaluator, EvaluatorContext, Model


class BitsPerByte(Evaluator):
    """Nats of the targets / (ln 2 x bytes of the targets).

    Special tokens and ignored targets have no bytes and count neither nats nor bytes.
    """

    def __init__(self, config: BpbConfig, context: EvaluatorContext) -> None:
        self.config = config
        self.context = context
        self.bytes_V = torch.tensor(context.tokenizer.token_bytes(), dtype=torch.int64, device=context.world.device)

    def evaluate(self, model: Model, step: int) -> Evaluation:
        """Metric ``val/bpb`` or ``train/bpb``.

        Raises:
            DataError: when no rank has a single byte to predict.
        """
        nats: list[Tensor] = []  # one number a batch, left on the device so that nothing waits inside the loop
        n_bytes: list[Tensor] = []
        for batch in self.context.rows(self.config.split, self.config.eval_tokens):
            losses_BT = model(batch.ids_BT, batch.targets_BT, reduction="none")
            bytes_BT = self.bytes_V[batch.targets_BT.clamp(min=0)].masked_fill(batch.targets_BT < 0, 0)
            nats.append(losses_BT.masked_fill(bytes_BT == 0, 0).sum())
            n_bytes.append(bytes_BT.sum())
        own = [math.fsum(torch.stack(nats).tolist()), sum(torch.stack(n_bytes).tolist())] if nats else [0.0, 0.0]
        total_nats, total_bytes = self.context.world.sum(own)
        if total_bytes == 0:
            raise DataError(
                f"bpb: the {self.config.split} split has not a single byte to predict: "
                f"give the data source documents for it, or pick the other split"
            )
        return Evaluation({f"{self.config.split}/bpb": total_nats / (math.log(2) * total_bytes)})
