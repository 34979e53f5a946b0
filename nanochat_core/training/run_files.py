"""The files that a run writes when it starts, and the comparison with those of its previous start."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch

from nanochat_core.config.tables import dump, to_tables
from nanochat_core.errors import CheckpointError
from nanochat_core.files import write_atomic
from nanochat_core.interfaces.logger import LoggerContext
from nanochat_core.planning.plan import Planned
from nanochat_core.runs.directory import RunDirectory, remove_start
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
        state: training state of the checkpoint that is resumed, or a fresh one.
        fingerprints: current fingerprints of ``tokenizer``, ``train`` and ``val``.
        report: prints and logs a line.

    Returns:
        The splits ("train", "val") whose data differ from those of a resumed run.

    Raises:
        CheckpointError: when data differ and that was not allowed, or the tokenizer differs.
    """
    run_dir, planned = setup.run_dir, setup.planned
    earlier: dict[str, Any] = {}
    before: Mapping[str, str] = fingerprints
    if setup.checkpoint is not None:
        earlier = run_dir.read_provenance()
        known = state.fingerprints or earlier.get("fingerprints", {})
        if not known:
            report(f"{run_dir.path} does not say with which tokenizer and data it was trained: nothing is compared")
        before = known or fingerprints
    changed = {what: before.get(what, "none") for what in fingerprints if before.get(what) != fingerprints[what]}
    if changed:
        _accept(changed, fingerprints, setup, state.step, report)
    facts = provenance(planned.origins, setup.distributions, fingerprints, attrs.asdict(planned.plan))
    facts["packages"]["torch"] = torch.__version__  # includes the build
    if changed:
        facts["other_data"] = {"from_step": state.step, "before": changed}
    if earlier:
        facts["earlier"] = [*earlier.pop("earlier", []), earlier]
    write_atomic(run_dir.experiment, HEADER + dump(planned.experiment))
    write_atomic(run_dir.provenance, json.dumps(facts, indent=1) + "\n")
    return list(changed)


def _accept(
    changed: Mapping[str, str],
    fingerprints: Mapping[str, str],
    setup: Setup,
    step: int,
    report: Callable[[str], None],
) -> None:
    """Report which fingerprints differ from those of the checkpoint, or refuse to continue.

    Args:
        changed: previous value of each fingerprint that differs.
    """
    run_dir = setup.run_dir
    if "tokenizer" in changed:
        raise CheckpointError(
            f"{run_dir.tokenizer} differs from the tokenizer that the run was trained with (fingerprint "
            f"{fingerprints['tokenizer'][:12]}, was {changed['tokenizer'][:12]}), so the weights do not fit: "
            f"restore it, or start a fresh run without --resume"
        )
    for what, was in changed.items():
        change = f"the {what} data differ from those it was trained with (fingerprint {fingerprints[what][:12]}, "
        change += f"was {was[:12]})"
        if not setup.allow_other_data:
            raise CheckpointError(
                f"{run_dir.path}: {change}: point [data] at the same documents, start a fresh run without "
                f"--resume, or continue with the new documents: --allow-other-data"
            )
        consequence = "they are read from their start" if what == "train" else "earlier results are not comparable"
        report(f"allowed: from step {step} on {change}; {consequence}")


def rewind_run(run_dir: RunDirectory, state: TrainState) -> list[str]:
    """Rewind the ledger to the checkpoint that is resumed.

    Evaluations of its step, which were recorded after it was saved, are kept, and update the smallest values in
    ``state``.

    Returns:
        The names of the evaluator entries that made them.
    """
    records = rewind_ledger(run_dir.ledger, state.ledger_bytes, state.step)
    for record in records:
        state.note_minimum({k: v for k, v in record.items() if k not in ("step", "time")})
    return [record["evaluator"] for record in records]


def logger_context(planned: Planned, run_dir: RunDirectory, start_step: int) -> LoggerContext:
    """Return the description of a run that its loggers receive when they start."""
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
    """Remove what a fresh run has made before it opened its ledger, and the directories above it if they are empty
    then. See ``remove_start``."""
    try:
        if not remove_start(run_dir):
            return
    except OSError:
        return
    for parent in (run_dir.path.parent, run_dir.path.parents[1]):
        try:
            parent.rmdir()
        except OSError:
            return
