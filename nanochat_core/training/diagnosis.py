"""Diagnosis of a run that diverged: the contents of the batch of its last skipped step."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import attrs
import torch

from nanochat_core.data.loader import Step
from nanochat_core.data.packing import Cursor
from nanochat_core.distributed.world import World
from nanochat_core.errors import NanochatError
from nanochat_core.evaluation.evaluate import inference
from nanochat_core.files import first_few, write_atomic
from nanochat_core.interfaces.model import Model
from nanochat_core.runs.directory import RunDirectory, list_checkpoints
from nanochat_core.training.parts import Parts
from nanochat_core.training.step import StepOutcome

BEGINNING = 300  # number of characters shown of a document


class TrainingDiverged(NanochatError):
    """Too many steps in a row with a loss or gradient that is not finite."""

    exit_code = 3


@attrs.frozen
class Divergence:
    """The last of too many steps in a row that were skipped.

    Args:
        number: index of the step, from 0.
        outcome: result of the step.
        batch: this rank's data.
        cursors: positions of this rank's lanes before the step.
        lr_multiplier: factor on every learning rate.
        skipped: number of steps that were skipped in a row.
    """

    number: int
    outcome: StepOutcome
    batch: Step
    cursors: Mapping[int, Cursor]
    lr_multiplier: float
    skipped: int


def nothing_learned(steps: int) -> TrainingDiverged:
    """Return the error for a run of which every step was skipped."""
    return TrainingDiverged(
        f"none of the {steps} steps had a finite loss and gradient, so the weights are those of the start: lower the "
        f"learning rates, or look for a value of [model] or [optimizer] that makes everything infinite"
    )


def diagnose(
    divergence: Divergence, parts: Parts, dtype: torch.dtype, world: World, run_dir: RunDirectory
) -> TrainingDiverged:
    """Write the contents of the batch, the loss of each row and the documents, to a file of the run. Collective.

    Args:
        dtype: of matrix products.

    Returns:
        The error to raise, the same on every rank.
    """
    done, lrm = divergence.number, divergence.lr_multiplier
    loss, norm = divergence.outcome.loss, divergence.outcome.grad_norm
    indices = parts.loader.documents(divergence.cursors, divergence.batch)
    documents = parts.source.documents("train")
    by_rank = world.all_gather_object(describe_batch(parts.model, dtype, divergence.batch, documents, indices))
    path = run_dir.diverged(done)
    content = {"step": done, "loss": str(loss), "grad_norm": str(norm), "lrm": lrm, "ranks": by_rank}
    written = f" (see {path})"
    if world.is_main:
        try:
            write_atomic(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        except OSError as error:
            written = f" ({path} can't be written: {error})"
    saved = list_checkpoints(run_dir.checkpoints)
    last = f"the last good checkpoint is {saved[0]}" if saved else "none was saved"
    return TrainingDiverged(
        f"{divergence.skipped} steps in a row had a loss or gradient that is not finite (step {done}, loss {loss}, "
        f"gradient norm {norm}, learning-rate multiplier {lrm:.3g}); {summarize(by_rank)}{written}; {last}. "
        f"Lower the learning rates, raise schedule.warmup_steps, or try train.dtype = float32; "
        f"see docs/troubleshooting.md"
    )


def describe_batch(
    model: Model, dtype: torch.dtype, step: Step, documents: Sequence[str], indices: Sequence[int]
) -> dict[str, Any]:
    """Describe this rank's part of a batch for JSON: the recomputed mean loss of each row, and the documents.

    Args:
        dtype: of matrix products.
        documents: all documents of the training split.
        indices: indices of the documents in the batch.
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
    except (NanochatError, OSError) as error:  # the divergence is the error to report
        return f"can't be read: {error}"


def summarize(parts: Sequence[dict[str, Any]]) -> str:
    """Summarize the batch of all ranks in one line.

    Args:
        parts: results of ``describe_batch``, by rank.
    """
    indices = sorted({entry["document"] for part in parts for entry in part["documents"]})
    bad = [
        f"{row['row']} of rank {rank}"
        for rank, part in enumerate(parts)
        for row in part["rows"]
        if isinstance(row["loss"], str)
    ]
    rows = f"rows with a loss that is not finite: {first_few(bad)}" if bad else "the loss of each row alone is finite"
    return f"its batch holds the training documents {first_few(_ranges(indices))}; {rows}"


def _ranges(numbers: Sequence[int]) -> list[str]:
    """Format increasing numbers as ranges such as ``3-7`` and ``12``."""
    runs = [[n for _, n in group] for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
