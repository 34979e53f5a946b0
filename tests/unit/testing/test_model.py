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


class Rows:
    """A row cache of ``Good``: the tokens so far, which are read again every time."""

    def __init__(self, rows: int, max_tokens: int) -> None:
        self.texts: list[list[int]] = [[] for _ in range(rows)]
        self.max_tokens = max_tokens

    @property
    def lengths(self) -> list[int]:
        return [len(text) for text in self.texts]

    def rows(self, start: int, stop: int, counts: Any = None) -> Any:
        return self, start, counts

    def save(self, row: int, length: int) -> list[int]:
        return self.texts[row][:length]

    def load(self, row: int, saved: list[int], length: int) -> None:
        self.texts[row] = saved[:length]

    def clear(self, row: int) -> None:
        self.texts[row] = []


class WithRows(Good):
    cache = Rows

    def new_row_cache(self, rows: int, max_tokens: int) -> Any:
        return self.cache(rows, max_tokens)

    def hidden(self, ids_BT: Any, cache: Any = None) -> Any:
        if cache is None:
            return super().hidden(ids_BT)
        rows, start, counts = cache
        states = torch.zeros(*ids_BT.shape, self.hidden_size)
        for b, (ids, count) in enumerate(zip(ids_BT.tolist(), counts or [ids_BT.shape[1]] * len(ids_BT), strict=True)):
            text = rows.texts[start + b]
            text += ids[:count]
            if count:
                states[b, :count] = super().hidden(torch.tensor([text]))[0, -count:]
        return states


class KeepsFreed(Rows):
    def clear(self, row: int) -> None:
        pass


class CountsPadding(WithRows):
    def hidden(self, ids_BT: Any, cache: Any = None) -> Any:
        return super().hidden(ids_BT, None if cache is None else (*cache[:2], None))


class FreedBadly(WithRows):
    cache = KeepsFreed


class SharedBadly(WithRows):
    class SharedRows(Rows):
        def load(self, row: int, saved: Any, length: int) -> None:
            self.texts[row] = self.texts[2]

    cache = SharedRows


def test_a_good_model() -> None:
    check_model(Good, None)
    check_model(WithRows, None)
    check_model(Checkpointed, None)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (SeesAhead, "a position sees tokens that come after it"),
        (MixesRows, "a row depends on the other rows"),
        (FreedBadly, "in a row that was freed"),
        (CountsPadding, "the lengths of a row cache are wrong after prompts"),
        (SharedBadly, "in a row with a copied prefix"),
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
