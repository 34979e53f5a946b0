"""``check_model`` notices each way of breaking the contract of models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nanochat_core import Model
from nanochat_core.testing import check_model


class Good(Model):
    """An embedding, a running mean, a head."""

    def __init__(self, config: object, context: Any) -> None:
        super().__init__()
        self.vocab_size, self.hidden_size = context.vocab_size, 8
        self.embedding = nn.Embedding(context.vocab_size, 8)
        self.matrix = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, context.vocab_size, bias=False)

    def hidden(self, ids_BT: Any, cache: Any = None) -> Any:
        x_BTD = self.embedding(ids_BT)
        count_T1 = torch.arange(1, ids_BT.shape[1] + 1)[:, None]
        return x_BTD + torch.tanh(self.matrix(x_BTD.cumsum(1) / count_T1))

    def logits(self, hidden_ND: Any) -> Any:
        return self.head(hidden_ND).float()


class SeesAhead(Good):
    def hidden(self, ids_BT: Any, cache: Any = None) -> Any:
        return super().hidden(ids_BT) + self.embedding(ids_BT).mean(1, keepdim=True)


class MixesRows(Good):
    def hidden(self, ids_BT: Any, cache: Any = None) -> Any:
        return super().hidden(ids_BT) - self.embedding(ids_BT).mean(0, keepdim=True)


class HalfLogits(Good):
    def logits(self, hidden_ND: Any) -> Any:
        return self.head(hidden_ND).bfloat16()


class WrongLoss(Good):
    def forward(self, ids_BT: Any, targets_BT: Any, reduction: Any = "sum") -> Any:
        return super().forward(ids_BT, targets_BT, reduction) / 2


class Unused(Good):
    def __init__(self, config: object, context: Any) -> None:
        super().__init__(config, context)
        self.unused = nn.Parameter(torch.ones(3))


class OwnRoles(Good):
    def parameter_roles(self) -> dict[str, str]:
        return {**super().parameter_roles(), "matrix.weight": "body"}


class Forgetful(Good):
    def __init__(self, config: object, context: Any) -> None:
        super().__init__(config, context)
        self.offset = 0.0

    def forward(self, ids_BT: Any, targets_BT: Any, reduction: Any = "sum") -> Any:
        self.offset += 0.1
        return super().forward(ids_BT, targets_BT, reduction)

    def logits(self, hidden_ND: Any) -> Any:
        return super().logits(hidden_ND) * (1 + self.offset)


class Unseeded(Good):
    def __init__(self, config: object, context: Any) -> None:
        super().__init__(config, context)
        with torch.no_grad():
            self.head.weight.normal_(generator=torch.Generator().manual_seed(torch.seed() % 2**31))


class Checkpointed(Good):
    """Its embedding is dropped out, and computed again in the backward pass."""

    again = False

    def hidden(self, ids_BT: Any, cache: Any = None) -> Any:
        return checkpoint(self.dropped, ids_BT, use_reentrant=False) if self.again else self.dropped(ids_BT)

    def dropped(self, ids_BT: Any) -> Any:
        return nn.functional.dropout(super().hidden(ids_BT), 0.2, self.training)

    def checkpoint_activations(self) -> None:
        self.again = True


class LosesGradients(Checkpointed):
    def hidden(self, ids_BT: Any, cache: Any = None) -> Any:
        return super().hidden(ids_BT).detach() if self.again else super().hidden(ids_BT)


class OtherFunction(Checkpointed):
    def dropped(self, ids_BT: Any) -> Any:
        return super().dropped(ids_BT) * (0.9 if self.again else 1)


def test_a_good_model() -> None:
    check_model(Good, None)
    check_model(Checkpointed, None)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (SeesAhead, "a position sees tokens that come after it"),
        (MixesRows, "a row depends on the other rows"),
        (HalfLogits, "logits must be float32"),
        (WrongLoss, "is not the cross-entropy"),
        (Unused, "parameter unused gets no gradient"),
        (OwnRoles, "has role 'body'"),
        (Forgetful, "saved and loaded, it gives different logits"),
        (Unseeded, "the same seed gives different weights"),
        (LosesGradients, r"checkpoint_activations changes the gradient of parameter embedding\.weight"),
        (OtherFunction, "checkpoint_activations changes the loss"),
    ],
)
def test_broken_models(model: Any, reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        check_model(model, None)


def test_check_model_refuses_what_is_none() -> None:
    with pytest.raises(AssertionError, match=r"must return a nanochat_core\.Model"):
        check_model(lambda config, context: object(), None)  # type: ignore[arg-type,return-value]
