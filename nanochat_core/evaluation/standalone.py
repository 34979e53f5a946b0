"""Evaluation of an existing model: the newest checkpoint of a run, a given checkpoint, or a model from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import attrs
import torch

from nanochat_core.config.load import LoadedExperiment, Tables, load
from nanochat_core.config.merge import parse_override
from nanochat_core.config.schema import Experiment
from nanochat_core.data.sources import build_source
from nanochat_core.data.tokenizer_cache import build_tokenizer
from nanochat_core.distributed.failures import Failures
from nanochat_core.distributed.guarded import EvaluationWorld
from nanochat_core.distributed.store import RankStore
from nanochat_core.distributed.watchdog import Watchdog
from nanochat_core.distributed.world import OtherRankFailed, World, join_world, leave_world
from nanochat_core.errors import CheckpointError, ConfigError, DataError, Problem
from nanochat_core.evaluation.build import build_evaluators
from nanochat_core.evaluation.evaluate import EvaluationFailed, evaluate_each
from nanochat_core.evaluation.results import EXAMPLES, TABLE, write_evaluation
from nanochat_core.evaluation.trained_model import TrainedModel, misfit, newest_checkpoint, open_trained
from nanochat_core.files import expand_path, shorten
from nanochat_core.hardware.casting import name_of
from nanochat_core.hardware.machine import compute_dtype
from nanochat_core.interfaces.data_source import DataSource
from nanochat_core.interfaces.evaluator import Evaluation
from nanochat_core.planning.build import build_model
from nanochat_core.plugins.calls import blame
from nanochat_core.plugins.choice import Choice
from nanochat_core.plugins.discovery import Plugins
from nanochat_core.runs.checkpoint import load_state, verify
from nanochat_core.runs.directory import EVALUATIONS, RunDirectory, find_run
from nanochat_core.runs.restore import load_recorded, load_run
from nanochat_core.runs.soundness import MANIFEST
from nanochat_core.runs.trust import require_trust

FAILED_EXIT_CODE = 1
# Options that may be overridden: those on which the weights do not depend.
CHANGEABLE = ("evaluators.", "data.", "train.device_batch_size", "train.dtype")
CHANGEABLE_ELSEWHERE = (*CHANGEABLE, "train.max_seq_len", "model.", "tokenizer.")


@attrs.frozen
class Subject:
    """A model to evaluate.

    Args:
        label: its name in messages and results.
        evaluations: the directory of its results.
        step: optimizer steps with which it was trained; 0 for a model from elsewhere.
        run, checkpoint: its run and checkpoint; None for a model from elsewhere.
        plugin, path: the plugin that loads a model from elsewhere, and the model's path; empty for a run.
    """

    label: str
    evaluations: Path
    step: int = 0
    run: RunDirectory | None = None
    checkpoint: Path | None = None
    plugin: str = ""
    path: str = ""


def _locate(target: str, runs_dir: Path) -> tuple[RunDirectory | None, Path | None]:
    """Return the run that ``target`` names, and the checkpoint if it names one; (None, None) for PLUGIN:PATH.

    Raises:
        CheckpointError: when there is no such run.
    """
    try:
        path = expand_path(target)
    except ValueError as error:
        raise CheckpointError(f"{shorten(target)} {error}") from None
    if (path / MANIFEST).is_file():
        return RunDirectory.of_checkpoint(path.resolve()), path.resolve()
    plugin, colon, reference = target.partition(":")
    if colon and plugin.isidentifier() and reference and not path.exists():
        return None, None
    return find_run(target, runs_dir), None


def find_subject(target: str, runs_dir: Path, plugins: Plugins) -> Subject:
    """Find the model that ``target`` names: a run, a checkpoint's directory, or PLUGIN:PATH, which that plugin loads.

    Raises:
        CheckpointError: when there is no such run or checkpoint, or it is damaged.
    """
    run, checkpoint = _locate(target, runs_dir)
    if run is None:
        plugin, _, reference = target.partition(":")
        name = re.sub(r"[^\w.-]+", "_", reference).strip("_.")
        return Subject(target, runs_dir / plugin / name / EVALUATIONS, plugin=plugin, path=reference)
    if checkpoint is None:
        return _of_run(run, newest_checkpoint(run, plugins))
    problem = verify(checkpoint) or misfit(run, checkpoint, plugins)
    if problem:
        raise CheckpointError(f"{checkpoint}: {problem}; evaluate another checkpoint of the run")
    return _of_run(run, checkpoint)


def _of_run(run: RunDirectory, checkpoint: Path) -> Subject:
    return Subject(str(checkpoint), run.evaluations, load_state(checkpoint).step, run, checkpoint)


def load_subject(subject: Subject, names: Sequence[str], overrides: Sequence[str], plugins: Plugins) -> Experiment:
    """Return the experiment of a subject, reduced to the requested evaluators.

    Args:
        names: entries of the experiment's ``[[evaluators]]``, or evaluator plugins; empty for all entries.
        overrides: texts ``KEY=VALUE``.

    Raises:
        ConfigError: when an option can't be changed or an evaluator is unknown, not installed, or not named at all.
    """
    allowed = CHANGEABLE if subject.run is not None else CHANGEABLE_ELSEWHERE
    wrong = [key for key in (".".join(parse_override(text)[0]) for text in overrides) if not key.startswith(allowed)]
    if wrong:
        message = f"can't be changed for an evaluation; these can: {', '.join(allowed)}"
        raise ConfigError([Problem(key, message, "--set") for key in wrong])
    known = {choice.name for choice in _load(subject, (), plugins).experiment.evaluators}
    added: dict[str, dict[str, str]] = {}
    for name in dict.fromkeys(n for n in names if n not in known):
        if plugins["evaluator"].get(name) is None:
            hint = plugins["evaluator"].suggest(name)
            entries = ", ".join(known) or "none"
            message = f"this is neither an entry of the experiment ({entries}) nor an evaluator plugin{hint}"
            raise ConfigError([Problem(name, message, "--evaluator")])
        added[name] = {"plugin": name}
    loaded = _load(subject, overrides, plugins, [Tables({"evaluators": added}, "--evaluator")] if added else [])
    chosen = tuple(c for c in loaded.experiment.evaluators if not names or c.name in names)
    if not chosen:
        installed = ", ".join(entry.name for entry in plugins["evaluator"])
        raise ConfigError(
            [
                Problem(
                    "--evaluator",
                    f"the experiment has no evaluators; name at least one installed plugin ({installed or 'none'})",
                )
            ]
        )
    needless = {"loggers", "optimizer", "data", "schedule"}
    skipped = {f"evaluators.{c.name}" for c in loaded.experiment.evaluators if c not in chosen}
    missing = [
        problem
        for problem in loaded.missing
        if problem.key.split(".")[0] not in needless and ".".join(problem.key.split(".")[:2]) not in skipped
    ]
    if missing:
        raise ConfigError(missing)
    return attrs.evolve(loaded.experiment, evaluators=chosen)


def check_subject(
    target: str, names: Sequence[str], overrides: Sequence[str], runs_dir: Path, plugins: Plugins, trusted: bool
) -> tuple[Subject, Experiment]:
    """Return the subject that ``target`` names and its experiment; see ``find_subject`` and ``load_subject``.

    Args:
        trusted: evaluate a run that is not under ``runs_dir`` without asking; see ``require_trust``.
    """
    run, _ = _locate(target, runs_dir)
    if run is not None:  # before anything is built by the word of its files
        require_trust(run, runs_dir, "nanochat eval", lambda: _used(run, names, plugins), [run.evaluations], trusted)
    subject = find_subject(target, runs_dir, plugins)
    experiment = load_subject(subject, names, overrides, plugins)
    return subject, experiment


def _used(run: RunDirectory, names: Sequence[str], plugins: Plugins) -> dict[str, Choice]:
    """What an evaluation uses of a run's own experiment, by table."""
    recorded = load_recorded(run, plugins).experiment
    used = {"tokenizer": recorded.tokenizer, "model": recorded.model, "data": recorded.data}
    return used | {f"evaluators.{c.name}": c for c in recorded.evaluators if not names or c.name in names}


def _load(
    subject: Subject, overrides: Sequence[str], plugins: Plugins, added: Sequence[Tables] = ()
) -> LoadedExperiment:
    if subject.run is not None and subject.checkpoint is not None:
        return load_run(subject.run, subject.checkpoint, plugins, overrides, added)
    part = {"plugin": subject.plugin, "path": subject.path}
    tables = {"tokenizer": part, "model": part, "train": {"dtype": "float32"}}
    data = plugins["data_source"].default()
    if data is not None:
        tables["data"] = {"plugin": data.name}
    return load(None, overrides, plugins, [Tables(tables, subject.label), *added], complete=False)


def open_subject(subject: Subject, experiment: Experiment, device: torch.device) -> TrainedModel:
    """Load the model and tokenizer of a subject onto ``device``."""
    if subject.run is not None and subject.checkpoint is not None:
        return open_trained(subject.run, subject.checkpoint, experiment, device)
    tokenizer = build_tokenizer(experiment.tokenizer)
    dtype = compute_dtype(experiment.train.dtype, device)
    model = build_model(experiment.model, experiment.train, tokenizer.vocab_size, device, for_training=False)
    model.to(device).eval()
    if model.max_positions is not None and model.max_positions < experiment.train.max_seq_len:
        experiment = attrs.evolve(experiment, train=attrs.evolve(experiment.train, max_seq_len=model.max_positions))
    return TrainedModel(model, tokenizer, experiment, dtype, Path(subject.path))


def evaluate_model(
    target: str,
    names: Sequence[str],
    overrides: Sequence[str],
    runs_dir: Path,
    plugins: Plugins,
    trusted: bool = False,
) -> int:
    """Evaluate a model on this rank of the world that the environment describes, and print the results.

    Args:
        target: a run, a checkpoint's directory, or PLUGIN:PATH.
        names: entries of the experiment's ``[[evaluators]]``, or evaluator plugins; empty for all entries.
        overrides: texts ``KEY=VALUE``.
        trusted: evaluate a run that is not under ``runs_dir`` without asking; see ``require_trust``.

    Returns:
        The exit code, 1 when an evaluator failed.

    Raises:
        NanochatError: for an error that the user can fix. With several ranks nothing is raised: the first failure is
            printed, and all ranks return its exit code.
    """
    world = join_world()
    store = RankStore.open(world.size)
    with Watchdog(world.rank, world.size, store):
        try:
            checked = world.on_main(lambda: check_subject(target, names, overrides, runs_dir, plugins, trusted))
            subject: Subject = checked[0]
            experiment: Experiment = checked[1]
            if world.is_main:
                chosen = ", ".join(choice.name for choice in experiment.evaluators)
                print(f"evaluating {subject.label} with {chosen}", flush=True)
            return _evaluate(subject, experiment, world)
        except OtherRankFailed as failure:
            return failure.exit_code
        except BaseException as raised:
            error = blame(raised) or raised
            if world.size == 1:
                if error is raised:
                    raise
                raise error from raised
            return Failures(world.rank, store).report_once(error)
        finally:
            leave_world()


def _evaluate(subject: Subject, experiment: Experiment, world: World) -> int:
    trained = open_subject(subject, experiment, world.device)
    guarded = EvaluationWorld.of(world)

    @cache  # built only when an evaluator reads documents
    def source() -> DataSource:
        if experiment.data.entry is None:
            raise DataError(
                "an evaluator reads documents: give the name of an installed data source", key="data.plugin"
            )
        return build_source(experiment.data)

    evaluators = build_evaluators(
        experiment.evaluators,
        source,
        cache(lambda split: source().fingerprint(split)),
        trained.tokenizer,
        trained.experiment,
        guarded,
        subject.evaluations,
    )
    failures: list[str] = []

    def failed(name: str, error: EvaluationFailed) -> None:
        failures.append(name)
        if world.is_main:
            print(f"evaluator {name} failed: {error}", flush=True)

    def report(line: str) -> None:
        if world.is_main:
            print(line, flush=True)

    model, dtype, step = trained.model, trained.dtype, subject.step
    for built, evaluation in evaluate_each(evaluators, model, dtype, step, guarded, failed, report=report):
        if world.is_main:
            more = {"subject": subject.label, "ranks": world.size, "dtype": name_of(dtype), "data": built.data}
            path = _write(subject, built.choice.name, evaluation, more)
            _show(built.choice.name, evaluation, path)
    return FAILED_EXIT_CODE if failures else 0


def _write(subject: Subject, name: str, evaluation: Evaluation, more: Mapping[str, Any]) -> Path:
    try:
        if subject.run is None:
            subject.evaluations.mkdir(parents=True, exist_ok=True)
        return write_evaluation(subject.evaluations, name, subject.step, evaluation, more)
    except OSError as error:
        where = error.filename or subject.evaluations
        raise CheckpointError(
            f"the results of {name} can't be written: {where}: {error.strerror}; its metrics are "
            f"{', '.join(f'{metric} {value:.6g}' for metric, value in evaluation.metrics.items())}"
        ) from error


def _show(name: str, evaluation: Evaluation, path: Path) -> None:
    print(f"\n{name}:")
    if evaluation.examples:
        print((path / TABLE).read_text(encoding="utf-8"))
    tasks = {row["task"] for row in evaluation.examples}  # their scores are in the table
    for metric, value in evaluation.metrics.items():
        if metric.rpartition("/")[2] not in tasks:
            print(f"{metric}: {value:.6g}")
    for title, text in evaluation.texts.items():
        print(f"{title}: {text}")
    for note in evaluation.notes:
        print(note)
    print(f"written to {path}{f' ({EXAMPLES} has every example)' if evaluation.examples else ''}", flush=True)
