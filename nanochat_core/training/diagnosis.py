"""What stood in the batch of a step that went wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch

from nanochat_core.data.loader import Step
from nanochat_core.errors import NanochatError
from nanochat_core.evaluation.evaluate import inference
from nanochat_core.files import first_few
from nanochat_core.interfaces.model import Model

BEGINNING = 300  # characters of a document that are shown


def describe_batch(
    model: Model, dtype: torch.dtype, step: Step, documents: Sequence[str], indices: Sequence[int]
) -> dict[str, Any]:
    """This rank's part of a batch, as JSON holds it: the mean loss of each row, computed anew, and its documents.

    Args:
        documents: of the training split; ``indices``: those that the batch is made of.
    """
    device = next(model.parameters()).device
    losses: list[float] = []
    with inference(model, dtype):
        for batch in step.batches:
            batch = batch.to(device)
            losses += model(batch.ids_BT, batch.targets_BT, "none").float().mean(-1).tolist()
    rows = [{"row": row, "loss": loss if math.isfinite(loss) else str(loss)} for row, loss in enumerate(losses)]
    return {"rows": rows, "documents": [{"document": i, "begins": _beginning(documents, i)} for i in indices]}


def _beginning(documents: Sequence[str], index: int) -> str:
    try:
        return documents[index][:BEGINNING]
    except (NanochatError, OSError) as error:  # it is told besides something worse
        return f"can't be read: {error}"


def summarize(parts: Sequence[dict[str, Any]]) -> str:
    """What all ranks' parts have in common, in a line.

    Args:
        parts: of ``describe_batch``, by rank.
    """
    indices = sorted({entry["document"] for part in parts for entry in part["documents"]})
    bad = [
        f"{row['row']} of rank {rank}"
        for rank, part in enumerate(parts)
        for row in part["rows"]
        if isinstance(row["loss"], str)
    ]
    rows = f"rows with a loss that is not finite: {first_few(bad)}" if bad else "the loss of each row alone is finite"
    return f"its batch is of the training documents {first_few(_ranges(indices))}; {rows}"


def _ranges(numbers: Sequence[int]) -> list[str]:
    """Rising numbers as ``3-7``, ``12``."""
    runs = [[n for _, n in group] for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
