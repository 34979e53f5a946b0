"""Types that several interfaces share; without torch, so that tokenizers and data sources start without it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORED = -1  # the target of a position where there is nothing to predict

Tokens: TypeAlias = npt.NDArray[np.int32]


@attrs.frozen
class Batch:
    """The rows of a micro-batch.

    Args:
        ids_BT: int64 [B, T] tokens that the model reads.
        targets_BT: int64 [B, T] tokens that follow them; ``IGNORED`` (-1) where there is nothing to predict.
    """

    ids_BT: Tensor
    targets_BT: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``; copies to a CUDA device are asynchronous."""
        if device.type == "cpu":
            return self
        pinned = device.type == "cuda"
        move = (lambda t: t.pin_memory().to(device, non_blocking=True)) if pinned else (lambda t: t.to(device))
        return Batch(move(self.ids_BT), move(self.targets_BT))


Split = Literal["train", "val"]


@attrs.frozen
class Resolved:
    """The value of an option that is "auto", and the formula that gave it, in words."""

    value: bool | int | float | str
    formula: str
