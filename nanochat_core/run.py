"""A run from its files: rank 0 loads, plans, and decides; every rank builds and trains."""

from __future__ import annotations

import json
import shutil
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import attrs
import torch
from tqdm import tqdm

from nanochat_core import loader as loading
from nanochat_core import packing
from nanochat_core.checkpoint import (
    CheckpointContent,
    latest_checkpoint,
    load_checkpoint,
    load_model_tensors,
    load_weights,
)
from nanochat_core.distributed import World, join_world, leave_world
from nanochat_core.errors import CheckpointError, ConfigError, DataError, NanochatError, PluginError, Problem
from nanochat_core.evaluate import Evaluations
from nanochat_core.hardware import peak_flops, peak_memory_mib
from nanochat_core.interfaces import (
    Batch,
    DataContext,
    DataSource,
    Evaluator,
    EvaluatorContext,
    Logger,
    LoggerContext,
    Model,
    ModelContext,
    Optimizer,
    Split,
    Tokenizer,
    TokenizerContext,
)
from nanochat_core.ledger import Ledger, rewind_ledger
from nanochat_core.load import add_places, changed_options, dump, load, to_tables
from nanochat_core.paths import cache_dir
from nanochat_core.plan import Planned, build_model, format_plan, make_plan, optimizer_context
from nanochat_core.plugins import Plugins, load_plugins
from nanochat_core.provenance import provenance
from nanochat_core.rundir import RunDirectory, all_runs, create_run, find_run, write_atomic
from nanochat_core.schedule import lr_multiplier
from nanochat_core.schema import Choice, Experiment
from nanochat_core.state import TrainState, restore_rng
from nanochat_core.trainer import PREEMPTED_EXIT_CODE, Trainer


@attrs.frozen
class Setup:
    """What rank 0 decided, and tells the others.

    Args:
        checkpoint: where to resume from; None for a fresh start.
        weights: checkpoint of ``[train] init_from``.
    """

    planned: Planned
    run_dir: RunDirectory
    checkpoint: Path | None
    weights: Path | None
    distributions: dict[str, str]


class _Quiet(NanochatError):
    """Rank 0 has already said what is wrong."""


def run_experiment(file: Path, overrides: Sequence[str], runs_dir: Path, resume: str | None) -> int:
    """Run an experiment on this rank of the world that the environment describes. Returns the exit code.

    Args:
        resume: None for a fresh run, "newest", "auto", or a reference to a run.

    Raises:
        NanochatError: on rank 0, when the user has to mend something; other ranks return its exit code silently.
    """
    world = join_world()
    try:
        if world.size > 1:
            torch.manual_seed(0)  # nothing may depend on it; a difference between ranks would
        setup = _on_main(world, lambda: _prepare(file, overrides, runs_dir, resume, world))
        if setup is None:
            return 0
        return _Session(setup, world).run()
    except _Quiet as quiet:
        return quiet.exit_code
    finally:
        leave_world()


def _on_main(world: World, work: Callable[[], Any]) -> Any:
    """Rank 0's result of ``work`` on every rank; when it fails, every rank raises."""
    outcome: tuple[Any, int] = (None, 0)
    error: BaseException | None = None
    if world.is_main:
        try:
            outcome = (work(), 0)
        except Exception as raised:
            error = raised
            outcome = (None, raised.exit_code if isinstance(raised, NanochatError) else 1)
    value, code = world.publish(outcome)
    if error is not None:
        raise error
    if code:
        quiet = _Quiet()
        quiet.exit_code = code
        raise quiet
    return value


# ------------------------------------------------------------------------------------------------------ rank 0 only


def _prepare(file: Path, overrides: Sequence[str], runs_dir: Path, resume: str | None, world: World) -> Setup | None:
    """Load and plan; choose the run directory. None when there is nothing left to do."""
    plugins = load_plugins()
    for failure in plugins.failures:
        print(failure, file=sys.stderr)
    loaded = load(file, overrides, plugins).require_all()
    planned = make_plan(loaded, world.size, world.device)
    experiment = planned.experiment
    found = _find_resume(resume, experiment.run.name, runs_dir)
    print(f"nanochat run {file}: experiment {experiment.run.name}\n{format_plan(planned)}", flush=True)
    if found is None:
        weights = None
        if experiment.train.init_from is not None:
            weights = _newest(find_run(experiment.train.init_from, runs_dir))
        run_dir = create_run(runs_dir, experiment.run.name)
        return Setup(planned, run_dir, None, weights, plugins.versions())
    run_dir, checkpoint = found
    _check_resume(planned, run_dir, plugins)
    state = load_checkpoint_state(checkpoint)
    if state.step >= planned.plan.num_iterations:
        print(
            f"{run_dir.path} is already at step {state.step} of {planned.plan.num_iterations}: nothing to do. "
            f"To train it further: --set train.num_iterations={2 * state.step}"
        )
        return None
    print(f"resuming {run_dir.path} from {checkpoint.name}")
    _explain_horizon(planned, run_dir, state.step, plugins)
    return Setup(planned, run_dir, checkpoint, None, plugins.versions())


def load_checkpoint_state(checkpoint: Path) -> TrainState:
    """Only the TrainState of a checkpoint."""
    return TrainState.from_json(json.loads((checkpoint / "state.json").read_text()))


def _newest(run: RunDirectory) -> Path:
    """The newest sound checkpoint of a run; damaged ones are named on stderr."""
    checkpoint, damaged = latest_checkpoint(run.checkpoints)
    for line in damaged:
        print(line, file=sys.stderr)
    if checkpoint is None:
        raise CheckpointError(f"{run.path} has no sound checkpoint; set checkpoint.save_every to save on the way")
    return checkpoint


def _find_resume(resume: str | None, name: str, runs_dir: Path) -> tuple[RunDirectory, Path] | None:
    if resume is None:
        return None
    if resume not in ("auto", "newest"):
        run = find_run(resume, runs_dir)
        return run, _newest(run)
    for run in all_runs(runs_dir, name):
        checkpoint, damaged = latest_checkpoint(run.checkpoints)
        for line in damaged:
            print(line, file=sys.stderr)
        if checkpoint is not None:
            return run, checkpoint
    if resume == "newest":
        raise CheckpointError(f"no run of {name!r} under {runs_dir} has a checkpoint to resume; leave --resume out")
    print(f"no run of {name} to resume, starting a fresh one")
    return None


def _check_resume(planned: Planned, run_dir: RunDirectory, plugins: Plugins) -> None:
    """Refuse to resume with options that would make it another run; name other changes."""
    old = load(run_dir.experiment, (), plugins).require_all().experiment
    problems = []
    for key, before, now, rule in changed_options(old, planned.experiment):
        if rule == "refuse":
            keep = f"--set '{key}={json.dumps(before)}'" if before is not None else "leave it out"
            message = f"was {before!r} in {run_dir.path}, is {now!r}: a resumed run can't change it; keep it ({keep}) "
            problems.append(Problem(key, message + "or start a fresh run without --resume"))
        elif rule == "warn":
            print(f"changed on resume: {key} was {before!r}, is {now!r}")
    if problems:
        error = ConfigError(problems)
        add_places(error, planned.origins)
        raise error


def _explain_horizon(planned: Planned, run_dir: RunDirectory, step: int, plugins: Plugins) -> None:
    """Say what the learning rate does when a run goes on with another horizon or schedule."""
    new, schedule = planned.plan, planned.experiment.schedule
    old_horizon = run_dir.read_status().get("num_iterations", new.num_iterations)
    old_schedule = load(run_dir.experiment, (), plugins).experiment.schedule
    if old_horizon == new.num_iterations and old_schedule == schedule:
        return
    before = lr_multiplier(old_schedule, max(step - 1, 0), old_horizon)
    now = lr_multiplier(schedule, step, new.num_iterations)
    warmdown = new.num_iterations - new.warmdown_steps
    print(
        f"the horizon was {old_horizon} steps, is {new.num_iterations}: the learning-rate multiplier goes from "
        f"{before:.3f} at step {step - 1} to {now:.3f} at step {step}, and falls from step {warmdown} "
        f"to {schedule.final_lr_frac:g} at the end"
    )


# -------------------------------------------------------------------------------------------------------- every rank


class _Session:
    """One rank's side of a run."""

    def __init__(self, setup: Setup, world: World) -> None:
        self.planned, self.plan, self.experiment = setup.planned, setup.planned.plan, setup.planned.experiment
        self.setup, self.run_dir, self.world = setup, setup.run_dir, world
        self.dtype: torch.dtype = getattr(torch, self.plan.dtype)
        self.loggers: list[tuple[Choice, Logger]] = []
        self.state = TrainState()
        self.ledger: Ledger | None = None
        self._log: IO[str] | None = None

    def run(self) -> int:
        """Build everything, train, and close everything. Returns the exit code."""
        lock = self._open_run()
        status: Literal["finished", "failed", "preempted"] = "failed"
        try:
            trainer = self._build()
            self._report(f"run directory {self.run_dir.path}")
            with trainer.loader:
                status = trainer.fit()
        except Exception as error:
            if isinstance(error, NanochatError):
                add_places(error, self.planned.origins)
            self._report_failure(error)
            raise
        finally:
            self._close(status)
            if lock is not None:
                lock.close()
        if status == "preempted":
            return PREEMPTED_EXIT_CODE
        self._say_goodbye()
        return 0

    def _open_run(self) -> IO[str] | None:
        """Lock the run and open its log, on rank 0. Returns the lock."""
        opened: list[IO[str]] = []

        def open_files() -> None:
            opened.append(self.run_dir.lock())
            self._log = self.run_dir.log.open("a", encoding="utf-8")
            self._log.write(format_plan(self.planned) + "\n")

        _on_main(self.world, open_files)
        return opened[0] if opened else None

    # -- building

    def _build(self) -> Trainer:
        world, plan, experiment = self.world, self.plan, self.experiment
        source = self._build_source()
        content: CheckpointContent | None = None
        if self.setup.checkpoint is not None:
            content = load_checkpoint(self.setup.checkpoint)
            self.state = content.state
        tokenizer = self._build_tokenizer(source)
        fingerprints = {"tokenizer": tokenizer.fingerprint, "train": source.fingerprint("train")}
        fingerprints["val"] = source.fingerprint("val")
        _on_main(world, lambda: self._write_run_files(fingerprints))

        documents = source.documents("train")
        if not len(documents):
            raise DataError(f"data source {experiment.data.plugin!r} has no training documents (options of [data])")
        if not self.state.lanes:
            self.state.lanes = packing.lanes(plan.rows_per_step, len(documents))
        model = self._build_model(tokenizer, content)
        optimizer = self._build_optimizer(model, content)
        if content is not None and f"{world.rank}/cpu" in content.rng:
            prefix = f"{world.rank}/"
            rng = {k.removeprefix(prefix): v for k, v in content.rng.items() if k.startswith(prefix)}
            restore_rng(rng, world.device)
        else:
            torch.manual_seed(experiment.train.seed + world.rank + 1_000_003 * self.state.step)
        loader = loading.TrainLoader(
            documents,
            tokenizer,
            rows_per_step=plan.rows_per_step,
            lanes=self.state.lanes,
            max_seq_len=plan.max_seq_len,
            device_batch_size=plan.device_batch_size,
            rank=world.rank,
            world_size=world.size,
            device=world.device,
            cursors={lane: packing.Cursor(*c) for lane, c in self.state.cursors.items()} or None,
        )
        evaluations = self._build_evaluations(source, tokenizer)
        evaluated = _on_main(world, self._rewind) if content is not None else []
        if world.is_main:
            self.ledger = Ledger(self.run_dir.ledger)
            self.run_dir.write_status("running", self.state.step, plan.num_iterations)
            self._build_loggers()
            peak, how = peak_flops(world.device, self.dtype)
            self._report(f"peak {peak / 1e12:.3g} TFLOP/s a device ({how}); {self.state.lanes} data lanes")
        return Trainer(
            plan=plan,
            experiment=experiment,
            world=world,
            run_dir=self.run_dir,
            model=model,
            forward=torch.compile(model, dynamic=False) if plan.compile else model,
            optimizer=optimizer,
            loader=loader,
            evaluations=evaluations,
            state=self.state,
            record=self._record,
            ledger_bytes=lambda: self.ledger.bytes if self.ledger else 0,
            report=self._report,
            evaluated=evaluated,
        )

    def _rewind(self) -> list[str]:
        """Rewind the ledger to the checkpoint. Returns the evaluators that have already seen its step."""
        records = rewind_ledger(self.run_dir.ledger, self.state.ledger_bytes, self.state.step)
        for record in records:
            self.state.note_minimum({k: v for k, v in record.items() if k not in ("step", "time")})
        return [record["evaluator"] for record in records]

    def _build_source(self) -> DataSource:
        choice = self.experiment.data
        source = choice.build(DataContext(cache_dir=cache_dir()))
        if not isinstance(source, DataSource):
            raise PluginError(f"the factory of data source {choice.plugin!r} must return a nanochat_core.DataSource")
        return source

    def _build_tokenizer(self, source: DataSource) -> Tokenizer:
        """Rank 0 trains it (unless a resumed run has it) and saves it into the run; everyone loads that."""
        choice, directory = self.experiment.tokenizer, self.run_dir.tokenizer

        def make() -> Tokenizer:
            made: Tokenizer = choice.build(TokenizerContext(documents=lambda: _each(source.documents("train"))))
            partial = directory.with_name(".tokenizer")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            made.save(partial)
            partial.rename(directory)
            return made

        if not directory.is_dir():
            self._report("building the tokenizer")
            _on_main(self.world, lambda: make() and None)
        tokenizer = load_tokenizer(choice, directory)
        if tokenizer.vocab_size != self.plan.vocab_size:
            raise ConfigError(
                [
                    Problem(
                        "tokenizer.vocab_size",
                        f"the tokenizer has {tokenizer.vocab_size} tokens, planned were {self.plan.vocab_size}: "
                        f"set it to {tokenizer.vocab_size}",
                    )
                ]
            )
        return tokenizer

    def _build_model(self, tokenizer: Tokenizer, content: CheckpointContent | None) -> Model:
        train = self.experiment.train
        torch.manual_seed(train.seed)
        context = ModelContext(tokenizer.vocab_size, train.max_seq_len, self.world.device, self.dtype)
        model = build_model(self.experiment.model, context, torch.device("cpu"))
        if content is not None:
            load_model_tensors(model, content.model, str(self.setup.checkpoint))
        elif self.setup.weights is not None:
            self._check_init_from(tokenizer, self.setup.weights)
            load_model_tensors(model, load_weights(self.setup.weights), str(self.setup.weights))
            self._report(f"starting from the weights of {self.setup.weights}")
        model.to(self.world.device)
        for parameter in model.parameters():
            self.world.broadcast(parameter.data)
        return model

    def _check_init_from(self, tokenizer: Tokenizer, checkpoint: Path) -> None:
        facts = json.loads((checkpoint.parents[1] / "provenance.json").read_text())
        if facts["fingerprints"]["tokenizer"] != tokenizer.fingerprint:
            message = (
                f"the tokenizer of {checkpoint.parents[1]} is another one, its weights mean other tokens; use the same "
                f"[tokenizer] and [data], or start from random weights"
            )
            raise ConfigError([Problem("train.init_from", message)])

    def _build_optimizer(self, model: Model, content: CheckpointContent | None) -> Optimizer:
        context = optimizer_context(model, self.world, self.plan.total_batch_size, self.plan.num_iterations)
        if type(model).parameter_roles is Model.parameter_roles:
            roles = sorted(set(context.roles.values()))
            self._report(
                f"model {self.experiment.model.plugin} declares no parameter roles: by shape it has {', '.join(roles)}"
            )
        optimizer = self.experiment.optimizer.build(context)
        if not isinstance(optimizer, Optimizer):
            raise PluginError(
                f"the factory of optimizer {self.experiment.optimizer.plugin!r} must return a nanochat_core.Optimizer"
            )
        if content is not None:
            optimizer.load_state_dict(content.optimizer)
        return optimizer

    def _build_evaluations(self, source: DataSource, tokenizer: Tokenizer) -> Evaluations:
        plan, world = self.plan, self.world
        known: dict[tuple[Split, int], loading.ValidationRows] = {}

        def rows(split: Split, tokens: int) -> Iterator[Batch]:
            if (split, tokens) not in known:
                documents = source.documents(split)
                if not len(documents):
                    raise DataError(f"data source {self.experiment.data.plugin!r} has no {split} documents")
                known[split, tokens] = loading.ValidationRows(
                    documents,
                    tokenizer,
                    tokens=tokens,
                    max_seq_len=plan.max_seq_len,
                    device_batch_size=plan.device_batch_size,
                    rank=world.rank,
                    world_size=world.size,
                )
            for batch in known[split, tokens]:
                yield batch.to(world.device)

        context = EvaluatorContext(tokenizer, world, plan.max_seq_len, plan.device_batch_size, rows)
        built: list[tuple[Choice, Evaluator]] = []
        for choice in self.experiment.evaluators:
            evaluator = choice.build(context)
            if not isinstance(evaluator, Evaluator):
                raise PluginError(f"the factory of evaluator {choice.plugin!r} must return a nanochat_core.Evaluator")
            built.append((choice, evaluator))
        samples = self.run_dir.path / "samples"
        return Evaluations(tuple(built), plan.num_iterations, self.dtype, world, samples, self._report)

    def _build_loggers(self) -> None:
        run = self.experiment.run
        context = LoggerContext(
            directory=self.run_dir.path,
            name=run.name,
            id=self.run_dir.id,
            project=run.project,
            group=run.group,
            tags=run.tags,
            experiment=to_tables(self.experiment),
            num_iterations=self.plan.num_iterations,
            start_step=self.state.step,
        )
        for choice in self.experiment.loggers:
            try:
                logger = choice.build(context)
                if not isinstance(logger, Logger):
                    raise PluginError("its factory must return a nanochat_core.Logger")
                self.loggers.append((choice, logger))
            except Exception as error:
                self._report(
                    f"logger {choice.name} can't start, the run goes on without it: {type(error).__name__}: {error}"
                )

    def _write_run_files(self, fingerprints: dict[str, str]) -> None:
        run_dir = self.run_dir
        if self.setup.checkpoint is not None:
            old = json.loads(run_dir.provenance.read_text())["fingerprints"]
            for what in ("tokenizer", "train", "val"):
                if old.get(what) != fingerprints[what]:
                    raise CheckpointError(
                        f"{run_dir.path}: the {what} data are not those it was trained with (fingerprint "
                        f"{fingerprints[what][:12]}, was {str(old.get(what))[:12]}): point [data] at the same "
                        f"documents, or start a fresh run without --resume"
                    )
        facts = provenance(self.planned.origins, self.setup.distributions, fingerprints, attrs.asdict(self.plan))
        if run_dir.provenance.exists():
            earlier = json.loads(run_dir.provenance.read_text())
            facts["earlier"] = [*earlier.pop("earlier", []), earlier]
        header = "# The resolved experiment, each auto filled in. provenance.json says where every value came from.\n"
        write_atomic(run_dir.experiment, header + dump(self.experiment))
        write_atomic(run_dir.provenance, json.dumps(facts, indent=1) + "\n")

    # -- telling

    def _report(self, line: str) -> None:
        """A line for people: to stdout and the run's log, from rank 0."""
        if self.world.is_main:
            tqdm.write(line)  # goes around a progress bar
            sys.stdout.flush()
            if self._log is not None:
                print(line, file=self._log, flush=True)

    def _record(self, step: int, values: dict[str, float | str]) -> None:
        """A ledger line, mirrored to the loggers. A logger that raises is reported once and left out from then on."""
        if self.ledger is None:
            return
        record = self.ledger.write(step, values)
        for choice, logger in list(self.loggers):
            try:
                logger.log(record)
            except Exception as error:
                self.loggers.remove((choice, logger))
                self._report(f"logger {choice.name} failed at step {step}, the run goes on without it: {error!r}")

    def _report_failure(self, error: Exception) -> None:
        if self._log is not None:
            self._log.write("".join(traceback.format_exception(error)))

    def _close(self, status: Literal["finished", "failed", "preempted"]) -> None:
        if not self.world.is_main:
            return
        for choice, logger in self.loggers:
            try:
                logger.finish(status)
            except Exception as error:
                self._report(f"logger {choice.name} failed to finish: {error!r}")
        if self.ledger is not None:
            self.run_dir.write_status(status, self.state.step, self.plan.num_iterations)
            self.ledger.close()
        elif self.setup.checkpoint is None:
            _remove_empty(self.run_dir)  # it failed before it had anything to show

    def _say_goodbye(self) -> None:
        state, run = self.state, f"{self.run_dir.name}/{self.run_dir.id}"
        self._report(f"Peak memory usage: {peak_memory_mib(self.world.device):.2f} MiB")
        self._report(f"Total training time: {state.training_time / 60:.2f} min")
        if "val/bpb" in state.minimum:
            self._report(f"Minimum validation bpb: {state.minimum['val/bpb']:.4f}")
        self._report(f"The run is in {self.run_dir.path}: experiment.toml, metrics.jsonl, checkpoints/, samples/")
        runs_dir = self.run_dir.path.parents[1]
        other = "" if runs_dir == Path("runs") else f" --runs-dir {runs_dir}"
        self._report(f'Next:  nanochat sample {run}{other} "The capital of France is"\n       nanochat runs{other}')
        if self._log is not None and self.world.is_main:
            self._log.close()


def _each(documents: Sequence[str]) -> Iterable[str]:
    """All documents in order, read in slices."""
    for start in range(0, len(documents), 256):
        yield from documents[start : start + 256]


def _remove_empty(run_dir: RunDirectory) -> None:
    """Remove a run's directory, and those above it that are empty then."""
    shutil.rmtree(run_dir.path, ignore_errors=True)
    for parent in (run_dir.path.parent, run_dir.path.parents[1]):
        try:
            parent.rmdir()
        except OSError:
            return


def load_tokenizer(choice: Choice, directory: Path) -> Tokenizer:
    """The tokenizer that a run saved."""

    def no_documents() -> Iterable[str]:
        raise PluginError(f"tokenizer {choice.plugin!r} asks for documents although context.saved is given")

    tokenizer = choice.build(TokenizerContext(documents=no_documents, saved=directory))
    if not isinstance(tokenizer, Tokenizer):
        raise PluginError(f"the factory of tokenizer {choice.plugin!r} must return a nanochat_core.Tokenizer")
    return tokenizer


@attrs.frozen
class TrainedModel:
    """A model of a run with its tokenizer."""

    model: Model
    tokenizer: Tokenizer
    experiment: Experiment
    dtype: torch.dtype
    checkpoint: Path


def load_trained(reference: str, runs_dir: Path, device: torch.device) -> TrainedModel:
    """The model and tokenizer of a run's newest sound checkpoint, on ``device``, in eval mode.

    Raises:
        CheckpointError: when there is no such run or checkpoint.
        ConfigError: when its plugins are not installed.
    """
    run = find_run(reference, runs_dir)
    checkpoint = _newest(run)
    experiment = load(run.experiment, (), load_plugins()).require_all().experiment
    tokenizer = load_tokenizer(experiment.tokenizer, run.tokenizer)
    dtype: torch.dtype = getattr(torch, experiment.train.dtype)
    context = ModelContext(tokenizer.vocab_size, experiment.train.max_seq_len, device, dtype)
    model = build_model(experiment.model, context, torch.device("cpu"))
    load_model_tensors(model, load_weights(checkpoint), str(checkpoint))
    return TrainedModel(model.to(device).eval(), tokenizer, experiment, dtype, checkpoint)
