"""The files that a run writes about itself when it starts, and what they say of the start before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch

from nanochat_core.config.tables import dump, to_tables
from nanochat_core.errors import CheckpointError
from nanochat_core.files import write_atomic
from nanochat_core.interfaces.logger import LoggerContext
from nanochat_core.planning.plan import Planned
from nanochat_core.runs.directory import RunDirectory
from nanochat_core.runs.ledger import rewind_ledger
from nanochat_core.runs.provenance import provenance
from nanochat_core.runs.state import TrainState
from nanochat_core.training.prepare import Setup

HEADER = "# The resolved experiment, each auto filled in. provenance.json says where every value came from.\n"


def write_run_files(
    setup: Setup, state: TrainState, fingerprints: Mapping[str, str], report: Callable[[str], None]
) -> list[str]:
    """Write ``experiment.toml`` and ``provenance.json``.

    Args:
        state: of the checkpoint that is resumed.
        fingerprints: of ``tokenizer``, ``train`` and ``val``, as they are now.
        report: tells people a line.

    Returns:
        Which data ("train", "val") differ from those that a resumed run had.

    Raises:
        CheckpointError: when some do and that was not allowed, or the tokenizer differs.
    """
    run_dir, planned = setup.run_dir, setup.planned
    earlier: dict[str, Any] = {}
    before: Mapping[str, str] = fingerprints
    if setup.checkpoint is not None:
        earlier = json.loads(run_dir.provenance.read_text())
        before = state.fingerprints or earlier["fingerprints"]
    others = {what: before.get(what, "none") for what in fingerprints if before.get(what) != fingerprints[what]}
    if others:
        _accept(others, fingerprints, setup, state.step, report)
    facts = provenance(planned.origins, setup.distributions, fingerprints, attrs.asdict(planned.plan))
    facts["packages"]["torch"] = torch.__version__  # with its build
    if others:
        facts["other_data"] = {"from_step": state.step, "before": others}
    if earlier:
        facts["earlier"] = [*earlier.pop("earlier", []), earlier]
    write_atomic(run_dir.experiment, HEADER + dump(planned.experiment))
    write_atomic(run_dir.provenance, json.dumps(facts, indent=1) + "\n")
    return list(others)


def _accept(
    others: Mapping[str, str],
    fingerprints: Mapping[str, str],
    setup: Setup,
    step: int,
    report: Callable[[str], None],
) -> None:
    """Report which fingerprints differ from before, or refuse to go on.

    Args:
        others: what they were.
    """
    run_dir = setup.run_dir
    if "tokenizer" in others:
        raise CheckpointError(
            f"{run_dir.tokenizer} holds another tokenizer than the run was trained with (fingerprint "
            f"{fingerprints['tokenizer'][:12]}, was {others['tokenizer'][:12]}): the weights mean other tokens; "
            f"put it back, or start a fresh run without --resume"
        )
    for what, was in others.items():
        change = f"the {what} data are not those it was trained with (fingerprint {fingerprints[what][:12]}, "
        change += f"was {was[:12]})"
        if not setup.allow_other_data:
            raise CheckpointError(
                f"{run_dir.path}: {change}: point [data] at the same documents, start a fresh run without "
                f"--resume, or go on with these all the same: --allow-other-data"
            )
        goes_on = "they are read from their start" if what == "train" else "earlier results don't compare"
        report(f"allowed: from step {step} on {change}; {goes_on}")


def rewind_run(run_dir: RunDirectory, state: TrainState) -> list[str]:
    """Rewind the ledger to the checkpoint that is resumed. Evaluations of its very step, which were made after it was
    saved, stay, and count for the smallest values in ``state``. Returns the names of their entries."""
    records = rewind_ledger(run_dir.ledger, state.ledger_bytes, state.step)
    for record in records:
        state.note_minimum({k: v for k, v in record.items() if k not in ("step", "time")})
    return [record["evaluator"] for record in records]


def logger_context(planned: Planned, run_dir: RunDirectory, start_step: int) -> LoggerContext:
    """What the loggers of a run are told when they start."""
    run = planned.experiment.run
    return LoggerContext(
        directory=run_dir.path,
        name=run.name,
        id=run_dir.id,
        project=run.project,
        group=run.group,
        tags=run.tags,
        experiment=to_tables(planned.experiment),
        num_iterations=planned.plan.num_iterations,
        start_step=start_step,
    )


def remove_run(run_dir: RunDirectory) -> None:
    """Remove a run's directory, and those above it that are empty then."""
    shutil.rmtree(run_dir.path, ignore_errors=True)
    for parent in (run_dir.path.parent, run_dir.path.parents[1]):
        try:
            parent.rmdir()
        except OSError:
            return
