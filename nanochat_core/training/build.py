"""Building the parts of a run on one rank, in the order of their dependencies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from nanochat_core.data import packing
from nanochat_core.data.loader import TrainLoader
from nanochat_core.data.sources import build_source, training_data_problems
from nanochat_core.data.token_cache import open_cache
from nanochat_core.data.tokenizer_cache import load_tokenizer, make_tokenizer
from nanochat_core.distributed.guarded import EvaluationWorld
from nanochat_core.distributed.signals import StopRequest
from nanochat_core.distributed.world import World
from nanochat_core.errors import ConfigError, DataError, Problem
from nanochat_core.evaluation.build import build_evaluators
from nanochat_core.evaluation.evaluate import Evaluations
from nanochat_core.files import cache_dir
from nanochat_core.hardware.casting import autocast
from nanochat_core.interfaces.data_source import DataSource
from nanochat_core.interfaces.model import Model
from nanochat_core.interfaces.optimizer import Optimizer
from nanochat_core.interfaces.tokenizer import Tokenizer
from nanochat_core.loggers.run_log import Logs
from nanochat_core.planning.build import build_model, build_optimizer, check_outputs
from nanochat_core.planning.plan import Plan, Planned
from nanochat_core.plugins.choice import Choice, DataSourceKeys
from nanochat_core.runs.checkpoint import CheckpointContent, load_model_tensors, load_state, saved_tensors
from nanochat_core.runs.directory import RunDirectory
from nanochat_core.runs.ledger import read_ledger
from nanochat_core.runs.saver import Saver
from nanochat_core.runs.state import TrainState, restore_rng
from nanochat_core.training.parts import Parts
from nanochat_core.training.prepare import Setup
from nanochat_core.training.run_files import rewind_run, write_run_files, writing

MAX_BYTES_TO_COUNT = 2**31  # a larger text is not read only to count its bytes


def build_parts(
    setup: Setup,
    content: CheckpointContent | None,
    state: TrainState,
    world: World,
    logs: Logs,
    stop: StopRequest,
    heartbeat: Callable[[str], None],
) -> Parts:
    """Build all parts of a run on this rank, in an order that matters. Collective.

    1. Data and tokenizer: rank 0 first, because it downloads what is missing, and so that an error is reported once.
    2. The run's files, which record the fingerprints of both: a run that may not continue with them ends here. Then
       the parts of ``state`` that refer to different data are dropped, before anything is built from it.
    3. Model, optimizer, loader, evaluators. The optimizer is built from parameters on their device, and its state is
       loaded before the model is compiled.
    4. The ledger is rewound last: a run that can't be built leaves it as it was.

    Building may draw random numbers. Call ``seed`` when everything is built.

    Args:
        content: content of the checkpoint that is resumed; None for a fresh run.
        state: training state of the checkpoint, or a fresh one; it becomes the state of the run.
        stop: ends evaluations when this rank is asked to stop.
        heartbeat: called before each evaluation, with a description of it.

    Raises:
        NanochatError: for an error that the user can correct.
    """
    planned, run_dir = setup.planned, setup.run_dir
    plan, experiment = planned.plan, planned.experiment
    world.on_main(writing(run_dir, lambda: _prepare_data(planned, run_dir, logs.report)))
    source = build_source(experiment.data)
    tokenizer = _load_tokenizer(planned, run_dir)
    train, val = source.fingerprint("train"), source.fingerprint("val")
    fingerprints = {"tokenizer": tokenizer.fingerprint, "train": train, "val": val}

    changed = world.on_main(writing(run_dir, lambda: write_run_files(setup, state, fingerprints, logs.report)))
    state.fingerprints = fingerprints
    if "train" in changed:  # cursors refer to documents of the previous data
        state.lanes, state.cursors = 0, {}

    model = _build_model(setup, content, tokenizer, world, logs.report)
    optimizer = _build_optimizer(planned, content, model, world)
    if plan.compile:
        model.compile_training()
    loader = build_loader(experiment.data, source, tokenizer, plan, state, world)
    guarded, directory = EvaluationWorld.of(world, stop), run_dir.evaluations
    evaluators = build_evaluators(
        experiment.evaluators, lambda: source, fingerprints.__getitem__, tokenizer, experiment, guarded, directory
    )
    dtype, steps = plan.torch_dtype, plan.num_iterations
    evaluations = Evaluations(evaluators, steps, dtype, guarded, run_dir.path, logs.report, heartbeat)

    evaluated: list[str] = (
        world.on_main(writing(run_dir, lambda: rewind_run(run_dir, state))) if content is not None else []
    )
    if "val" in changed:  # results on the previous data are not comparable
        state.minimum, state.comparable_from, evaluated = {}, state.step, []
    return Parts(model, optimizer, source, tokenizer, loader, evaluations, state, evaluated)


def seed(content: CheckpointContent | None, start: int, state: TrainState, world: World) -> None:
    """Restore this rank's random generators from the checkpoint, or seed them if it has no states for this rank.

    Args:
        start: ``train.seed``.
    """
    prefix = f"{world.rank}/"
    saved = {k.removeprefix(prefix): v for k, v in (content.rng if content else {}).items() if k.startswith(prefix)}
    if saved:
        restore_rng(saved, world.device)
    else:
        torch.manual_seed(start + world.rank + 1_000_003 * state.step)


def build_saver(setup: Setup, state: TrainState, world: World, report: Callable[[str], None]) -> Saver:
    """Return the writer of the run's checkpoints, which knows the earlier evaluations of a resumed run."""
    options, run_dir = setup.planned.experiment.checkpoint, setup.run_dir
    saver = Saver(run_dir.checkpoints, options, report, run_dir.ledger)
    if setup.checkpoint is not None:
        saver.sound = state.step
    if world.is_main and options.keep_best is not None:
        for record in read_ledger(run_dir.ledger):
            if record["step"] >= state.comparable_from:
                saver.note(record["step"], record)
    return saver


# -- data and tokenizer


def _prepare_data(planned: Planned, run_dir: RunDirectory, report: Callable[[str], None]) -> None:
    """Check that there are training documents, and make the run's tokenizer if it has none."""
    choice = planned.experiment.data
    source = build_source(choice)
    if not len(source.documents("train")):
        raise DataError(f"data source {choice.plugin!r} has no training documents; see [data]")
    for line in training_data_problems(choice, source):
        report(f"warning: {line}")
    if not run_dir.tokenizer.is_dir():
        make_tokenizer(planned.experiment.tokenizer, source, report).copy_to(run_dir.tokenizer)


def _load_tokenizer(planned: Planned, run_dir: RunDirectory) -> Tokenizer:
    tokenizer = load_tokenizer(planned.experiment.tokenizer, run_dir.tokenizer)
    if tokenizer.vocab_size != planned.plan.vocab_size:
        message = (
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the plan assumes {planned.plan.vocab_size}: "
            f"set it to {tokenizer.vocab_size}"
        )
        raise ConfigError([Problem("tokenizer.vocab_size", message)])
    return tokenizer


# -- model and optimizer


def _build_model(
    setup: Setup, content: CheckpointContent | None, tokenizer: Tokenizer, world: World, report: Callable[[str], None]
) -> Model:
    """Return the model on the device, with its weights, which are the same on every rank."""
    experiment = setup.planned.experiment
    torch.manual_seed(experiment.train.seed)
    model = build_model(experiment.model, experiment.train, tokenizer.vocab_size, world.device, for_training=True)
    if content is not None:
        load_model_tensors(model, content.model, str(setup.checkpoint))
    elif setup.weights is not None:
        _copy_weights(model, setup.weights, experiment.model, tokenizer)
        report(f"starting from the weights of {setup.weights}")
    model.to(world.device)
    for parameter in model.parameters():
        world.broadcast(parameter.data)
    with experiment.model.calling(), autocast(world.device, setup.planned.plan.torch_dtype):
        check_outputs(experiment.model, model)
    if type(model).parameter_roles is Model.parameter_roles:
        roles = ", ".join(sorted(set(model.parameter_roles().values())))
        report(f"model {experiment.model.plugin} declares no parameter roles; roles derived from shapes: {roles}")
    return model


def _copy_weights(model: Model, weights: Path, choice: Choice, tokenizer: Tokenizer) -> None:
    """Copy the weights of another run's checkpoint into the model; that run must have the same tokenizer."""
    run = weights.parents[1]
    known = load_state(weights).fingerprints or RunDirectory(run).read_provenance().get("fingerprints", {})
    theirs = known.get("tokenizer")
    if theirs != tokenizer.fingerprint:
        message = (
            f"the tokenizer of {run} differs from that of this experiment, so its weights do not fit: use the "
            f"[tokenizer] and [data] of that run, or start from random weights"
        )
        raise ConfigError([Problem("train.init_from", message)])
    assert choice.entry is not None
    load_model_tensors(model, saved_tensors(weights, choice.entry), str(weights))


def _build_optimizer(planned: Planned, content: CheckpointContent | None, model: Model, world: World) -> Optimizer:
    optimizer = build_optimizer(planned.experiment.optimizer, model, planned.plan, world)
    if content is not None:
        optimizer.load_state_dict(content.optimizer)
    return optimizer


# -- training steps


def allowed_epochs(keys: DataSourceKeys) -> int | None:
    """Return the number of passes over the training data that a run may make; None means any number."""
    if keys.epochs == "repeat":
        return None
    return 1 if keys.epochs == "error" else keys.epochs


def _check_epochs(keys: DataSourceKeys, plan: Plan, source: DataSource) -> None:
    """Refuse a run that is certain to need more data than there are: a token has at least one byte.

    The source knows the size of its text only roughly. Where that seems too small, and is not too large to read, the
    bytes are counted.
    """
    epochs, estimate = allowed_epochs(keys), source.describe().get("text_bytes")
    if epochs is None or not isinstance(estimate, int) or estimate > MAX_BYTES_TO_COUNT:
        return
    documents = source.documents("train")
    needed = -(-plan.total_tokens // epochs) - len(documents)  # one token of each document is bos
    if estimate >= needed:
        return
    counted = 0
    for document in documents:
        counted += len(document.encode(errors="replace"))
        if counted >= needed:
            return
    raise DataError(
        f"the run needs {plan.total_tokens:,} tokens, more than there are in {counted:,} bytes of training text read "
        f'{epochs} times: provide more data, train for fewer steps, or set data.epochs to "repeat" or a higher number',
        key="data.epochs",
    )


def build_loader(
    choice: Choice, source: DataSource, tokenizer: Tokenizer, plan: Plan, state: TrainState, world: World
) -> TrainLoader:
    """Return the loader of this rank's training data from ``state`` on; sets the number of lanes in a fresh state.

    Raises:
        DataError: when there are too few data for the plan; see ``[data] epochs``.
    """
    keys, documents = choice.keys, source.documents("train")
    assert isinstance(keys, DataSourceKeys)
    world.on_main(lambda: _check_epochs(keys, plan, source))
    if not state.lanes:
        state.lanes = packing.lanes(plan.rows_per_step, len(documents), keys.packing, keys.packing_window)
    tokens: packing.TokenSource = packing.Encoder(documents, tokenizer)
    if keys.cache:
        tokens = open_cache(cache_dir(), tokens, source.fingerprint("train"), tokenizer)
    return TrainLoader(
        tokens,
        rows_per_step=plan.rows_per_step,
        lanes=state.lanes,
        max_seq_len=plan.max_seq_len,
        device_batch_size=plan.device_batch_size,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
        cursors={lane: packing.Cursor(*cursor) for lane, cursor in state.cursors.items()} or None,
        packing=keys.packing,
        window=keys.packing_window,
        epochs=allowed_epochs(keys),
        threads=keys.threads,
    )
