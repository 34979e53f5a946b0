"""A run from its files: rank 0 prepares, every rank builds and trains."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import shutil
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from nanochat_core.config.origins import add_places
from nanochat_core.config.tables import dump, to_tables
from nanochat_core.data.sources import build_source
from nanochat_core.data.tokenizer_cache import load_tokenizer, make_tokenizer
from nanochat_core.distributed.failures import Failures
from nanochat_core.distributed.guarded import EvaluationWorld
from nanochat_core.distributed.signals import PREEMPTED_EXIT_CODE, Stopped, StopRequest
from nanochat_core.distributed.store import RankFailure, RankStore
from nanochat_core.distributed.watchdog import Watchdog
from nanochat_core.distributed.world import OtherRankFailed, World, join_world, leave_world
from nanochat_core.errors import CheckpointError, ConfigError, DataError, NanochatError, Problem
from nanochat_core.evaluation.build import build_evaluators
from nanochat_core.evaluation.evaluate import Evaluations
from nanochat_core.files import write_atomic
from nanochat_core.hardware.machine import determinism, keep_freed_memory, peak_flops, peak_memory_mib
from nanochat_core.interfaces.logger import LoggerContext
from nanochat_core.interfaces.model import Model, ModelContext
from nanochat_core.interfaces.optimizer import Optimizer
from nanochat_core.interfaces.tokenizer import Tokenizer
from nanochat_core.loggers.observers import observer_choices
from nanochat_core.loggers.run_log import Logs, Status
from nanochat_core.planning.banner import format_plan
from nanochat_core.planning.build import build_model, build_optimizer
from nanochat_core.planning.out_of_memory import OutOfMemory, is_out_of_memory
from nanochat_core.planning.probe import settle_batch_size
from nanochat_core.runs.checkpoint import (
    CheckpointContent,
    load_checkpoint,
    load_model_tensors,
    remove_leftovers,
    saved_tensors,
)
from nanochat_core.runs.directory import RunDirectory
from nanochat_core.runs.ledger import best_value, read_ledger, rewind_ledger
from nanochat_core.runs.provenance import provenance
from nanochat_core.runs.saver import Saver
from nanochat_core.runs.state import TrainState, restore_rng
from nanochat_core.training.build import build_loader
from nanochat_core.training.prepare import Setup, prepare
from nanochat_core.training.trainer import Trainer

LAST_SECONDS = 5.0  # what a run that was told to stop, and is saved, waits for reads in progress


def run_experiment(
    file: Path,
    overrides: Sequence[str],
    runs_dir: Path,
    resume: str | None,
    allow_other_data: bool,
    stop: StopRequest,
) -> int:
    """Run an experiment on this rank of the world that the environment describes. Returns the exit code.

    Args:
        resume: None for a fresh run, "newest", "auto", or a reference to a run.
        allow_other_data: a resumed run may go on with other data.
        stop: listens for signals.

    Raises:
        NanochatError: when the user has to mend something. With several ranks nothing is raised: the first failure is
            shown, and all ranks return its exit code.
        Stopped: when a stop is asked for before training has begun.
    """
    with stop.interruptible():
        world = join_world()
    if world.device.type == "cpu":
        keep_freed_memory()
    store = RankStore.open(world.size)
    failures = Failures(world.rank, store)
    with Watchdog(world.rank, world.size, store) as watchdog:
        try:
            with contextlib.ExitStack() as exit_stack:
                with stop.interruptible():
                    setup = world.on_main(
                        lambda: prepare(file, overrides, runs_dir, resume, world, exit_stack, allow_other_data)
                    )
                    if setup is None:
                        return 0
                    planned = settle_batch_size(setup.planned, world)
                with determinism(planned.experiment.train.deterministic):
                    return _Session(attrs.evolve(setup, planned=planned), world, failures, watchdog, stop).run()
        except OtherRankFailed as failure:
            return failure.exit_code
        except Stopped:
            store.mark_failure(RankFailure(world.rank, PREEMPTED_EXIT_CODE))  # others may wait for this rank
            watchdog.end_within(LAST_SECONDS, PREEMPTED_EXIT_CODE)
            raise
        except Exception as error:
            if world.size == 1:
                raise
            return failures.report_once(error)
        finally:
            leave_world()


class _Session:
    """One rank's side of a run."""

    def __init__(self, setup: Setup, world: World, failures: Failures, watchdog: Watchdog, stop: StopRequest) -> None:
        self.planned, self.plan, self.experiment = setup.planned, setup.planned.plan, setup.planned.experiment
        self.setup, self.run_dir, self.world = setup, setup.run_dir, world
        self.dtype: torch.dtype = getattr(torch, self.plan.dtype)
        self.failures, self.watchdog, self.stop = failures, watchdog, stop
        self.logs = Logs(self.run_dir)
        self.state = TrainState()

    def run(self) -> int:
        """Build everything, train, and close everything. Returns the exit code."""
        self.world.on_main(self._open)
        if not self.world.is_main:
            self.failures.terminal = self.logs.open_rank(self.world.rank)
        if self.world.size > 1:
            faulthandler.enable()  # a crash in native code writes its stacks to this rank's log
        status: Status = "failed"
        with contextlib.ExitStack() as last:
            try:
                with self.stop.interruptible():
                    trainer = self._build()
                last.enter_context(trainer.loader)  # closed last: it waits for a read in progress
                self.logs.report(f"run directory {self.run_dir.path}")
                status = trainer.fit()
                found = self.world.all_gather_object(list(trainer.data_problems()))
                problems = sorted({line for lines in found for line in lines})
                if problems:
                    text = "places in the data could not be read and were skipped; see log.txt"
                    self.logs.report(f"{len(problems)} {text}")
            except Stopped:
                status = "preempted"
                raise
            except Exception as raised:
                error = self._failed(raised)
                if error is raised:
                    raise
                raise error from raised
            finally:
                self.watchdog.stop_watching()
                self._end(status)
            code = PREEMPTED_EXIT_CODE if status == "preempted" else 0
            self.world.barrier()  # what started the ranks may end all of them when the first has ended
            if code:
                self.watchdog.end_within(LAST_SECONDS, code)
        return code

    def _failed(self, error: Exception) -> Exception:
        """Note why the run fails, before anything is waited for or closed. Returns what to raise."""
        self.watchdog.stop_watching()
        if isinstance(error, OtherRankFailed):
            return error
        if isinstance(error, NanochatError):
            add_places(error, self.planned.origins)
            self.logs.note(f"failed: {error}")
        else:
            self.logs.note("".join(traceback.format_exception(error)))
            if is_out_of_memory(error):
                error = OutOfMemory(self.plan, f"the run was at step {self.state.step}", str(error))
        if self.world.size > 1:
            self.failures.report_once(error)
        return error

    def _open(self) -> None:
        self.logs.open()
        for name in (*self.run_dir.remove_leftovers(), *remove_leftovers(self.run_dir.checkpoints)):
            self.logs.note(f"removed {name}, which a process left that was killed")
        self.logs.note(format_plan(self.planned))

    def _end(self, status: Status) -> None:
        if not self.world.is_main:
            return
        if self.logs.has_ledger:
            self.logs.status(status, self.state.step, self.plan.num_iterations)
            self.logs.finish(status)  # waits for loggers, so that it comes after what others want to know
            if status == "finished":
                self._say_goodbye()
        self.logs.close()
        if self.setup.checkpoint is None and not self.run_dir.ledger.exists():
            _remove(self.run_dir)  # it failed before it had anything to show

    # -- building

    def _build(self) -> Trainer:
        world, plan, experiment, logs = self.world, self.plan, self.experiment, self.logs
        content = load_checkpoint(self.setup.checkpoint) if self.setup.checkpoint is not None else None
        if content is not None:
            self.state = content.state
        world.on_main(self._prepare_data)  # rank 0 first: it fetches, and what is wrong is said once
        source = build_source(experiment.data)
        tokenizer = self._load_tokenizer()
        train, val = source.fingerprint("train"), source.fingerprint("val")
        fingerprints = {"tokenizer": tokenizer.fingerprint, "train": train, "val": val}
        others = world.on_main(lambda: self._write_run_files(fingerprints))
        self.state.fingerprints = fingerprints
        if "train" in others:  # cursors mean documents that are no longer there
            self.state.lanes, self.state.cursors = 0, {}
        model = self._build_model(tokenizer, content)
        if type(model).parameter_roles is Model.parameter_roles:
            roles = ", ".join(sorted(set(model.parameter_roles().values())))
            logs.report(f"model {experiment.model.plugin} declares no parameter roles; by shape it has: {roles}")
        optimizer: Optimizer = build_optimizer(experiment.optimizer, model, plan, world)
        if content is not None:
            optimizer.load_state_dict(content.optimizer)
        if plan.compile:
            model.compile_training()
        loader = build_loader(experiment.data, source, tokenizer, plan, self.state, world)
        guarded, evaluations = EvaluationWorld.of(world, self.stop), self.run_dir.path / "evaluations"
        evaluators = build_evaluators(
            experiment.evaluators, lambda: source, fingerprints.__getitem__, tokenizer, experiment, guarded, evaluations
        )
        evaluated: list[str] = world.on_main(self._rewind_ledger) if content is not None else []
        if "val" in others:  # what was measured on the old set compares with nothing
            self.state.minimum, self.state.comparable_from, evaluated = {}, self.state.step, []
        peak, how = peak_flops(world.device, self.dtype)
        logs.report(
            f"peak {peak / 1e12:.3g} TFLOP/s a device ({how}); {self.state.lanes} data lanes; "
            f"validation data {val[:12]}"
        )
        world.barrier()  # a run that some rank can't build leaves nothing behind
        if world.is_main:
            logs.open_ledger()
            logs.status("running", self.state.step, plan.num_iterations)
            observers = observer_choices(self.setup.observers)
            logs.start_loggers((*experiment.loggers, *observers), self._logger_context())
        packages = experiment.packages()
        self.watchdog.report_stalls(experiment.train.stall_warning, packages, logs.report, logs.note)
        self._seed(content)  # last: whatever was built before may have drawn numbers
        return Trainer(
            plan=plan,
            experiment=experiment,
            world=world,
            run_dir=self.run_dir,
            model=model,
            optimizer=optimizer,
            loader=loader,
            evaluations=Evaluations(
                evaluators,
                plan.num_iterations,
                self.dtype,
                guarded,
                self.run_dir.path,
                logs.report,
                self.watchdog.heartbeat,
            ),
            state=self.state,
            logs=logs,
            saver=self._saver(),
            stop=self.stop,
            heartbeat=self.watchdog.heartbeat,
            documents=source.documents("train"),
            data_problems=source.problems,
            evaluated=evaluated,
        )

    def _prepare_data(self) -> None:
        """See that there are documents, and that the run has its tokenizer."""
        choice, directory = self.experiment.data, self.run_dir.tokenizer
        source = build_source(choice)
        if not len(source.documents("train")):
            raise DataError(f"data source {choice.plugin!r} has no training documents; see [data]")
        if not directory.is_dir():
            make_tokenizer(self.experiment.tokenizer, source, self.logs.report).copy_to(directory)

    def _load_tokenizer(self) -> Tokenizer:
        tokenizer = load_tokenizer(self.experiment.tokenizer, self.run_dir.tokenizer)
        if tokenizer.vocab_size != self.plan.vocab_size:
            message = (
                f"the tokenizer has {tokenizer.vocab_size} tokens, planned were {self.plan.vocab_size}: "
                f"set it to {tokenizer.vocab_size}"
            )
            raise ConfigError([Problem("tokenizer.vocab_size", message)])
        return tokenizer

    def _build_model(self, tokenizer: Tokenizer, content: CheckpointContent | None) -> Model:
        """The model with its weights, on the device, the same on every rank."""
        train, weights = self.experiment.train, self.setup.weights
        torch.manual_seed(train.seed)
        context = ModelContext(tokenizer.vocab_size, train.max_seq_len, self.world.device, self.dtype)
        model = build_model(self.experiment.model, context, torch.device("cpu"), train.activation_checkpointing)
        if content is not None:
            load_model_tensors(model, content.model, str(self.setup.checkpoint))
        elif weights is not None:
            theirs = json.loads((weights.parents[1] / "provenance.json").read_text())["fingerprints"]["tokenizer"]
            if theirs != tokenizer.fingerprint:
                message = (
                    f"the tokenizer of {weights.parents[1]} is another one, its weights mean other tokens: use its "
                    f"[tokenizer] and [data], or start from random weights"
                )
                raise ConfigError([Problem("train.init_from", message)])
            assert self.experiment.model.entry is not None
            load_model_tensors(model, saved_tensors(weights, self.experiment.model.entry), str(weights))
            self.logs.report(f"starting from the weights of {weights}")
        model.to(self.world.device)
        for parameter in model.parameters():
            self.world.broadcast(parameter.data)
        return model

    def _seed(self, content: CheckpointContent | None) -> None:
        """This rank's random generators: those of the checkpoint, or fresh ones."""
        prefix = f"{self.world.rank}/"
        saved = {k.removeprefix(prefix): v for k, v in (content.rng if content else {}).items() if k.startswith(prefix)}
        if saved:
            restore_rng(saved, self.world.device)
        else:
            torch.manual_seed(self.experiment.train.seed + self.world.rank + 1_000_003 * self.state.step)

    def _rewind_ledger(self) -> list[str]:
        """Rewind the ledger to the checkpoint. Returns the evaluators that have already seen its step."""
        records = rewind_ledger(self.run_dir.ledger, self.state.ledger_bytes, self.state.step)
        for record in records:
            self.state.note_minimum({k: v for k, v in record.items() if k not in ("step", "time")})
        return [record["evaluator"] for record in records]

    def _saver(self) -> Saver:
        options, state = self.experiment.checkpoint, self.state
        saver = Saver(self.run_dir.checkpoints, options, self.logs.report, self.run_dir.ledger)
        if self.setup.checkpoint is not None:
            saver.sound = state.step
        if self.world.is_main and options.keep_best is not None:
            for record in read_ledger(self.run_dir.ledger):
                if record["step"] >= state.comparable_from:
                    saver.note(record["step"], record)
        return saver

    def _logger_context(self) -> LoggerContext:
        run = self.experiment.run
        return LoggerContext(
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

    def _write_run_files(self, fingerprints: dict[str, str]) -> list[str]:
        """``experiment.toml`` and ``provenance.json``. Returns which data ("train", "val") are not those that a
        resumed run had.

        Raises:
            CheckpointError: when there are such and they were not allowed, or its tokenizer is another.
        """
        run_dir, earlier = self.run_dir, dict[str, Any]()
        before = fingerprints
        if self.setup.checkpoint is not None:
            earlier = json.loads(run_dir.provenance.read_text())
            before = self.state.fingerprints or earlier["fingerprints"]
        others = {what: before.get(what, "none") for what in fingerprints if before.get(what) != fingerprints[what]}
        if others:
            self._accept(others, fingerprints)
        facts = provenance(self.planned.origins, self.setup.distributions, fingerprints, attrs.asdict(self.plan))
        facts["packages"]["torch"] = torch.__version__  # with its build
        if others:
            facts["other_data"] = {"from_step": self.state.step, "before": others}
        if earlier:
            facts["earlier"] = [*earlier.pop("earlier", []), earlier]
        header = "# The resolved experiment, each auto filled in. provenance.json says where every value came from.\n"
        write_atomic(run_dir.experiment, header + dump(self.experiment))
        write_atomic(run_dir.provenance, json.dumps(facts, indent=1) + "\n")
        return list(others)

    def _accept(self, others: Mapping[str, str], fingerprints: Mapping[str, str]) -> None:
        """Say which fingerprints are not what they were, or refuse to go on.

        Args:
            others: what they were.
        """
        if "tokenizer" in others:
            raise CheckpointError(
                f"{self.run_dir.tokenizer} holds another tokenizer than the run was trained with (fingerprint "
                f"{fingerprints['tokenizer'][:12]}, was {others['tokenizer'][:12]}): the weights mean other tokens; "
                f"put it back, or start a fresh run without --resume"
            )
        for what, was in others.items():
            change = f"the {what} data are not those it was trained with (fingerprint {fingerprints[what][:12]}, "
            change += f"was {was[:12]})"
            if not self.setup.allow_other_data:
                raise CheckpointError(
                    f"{self.run_dir.path}: {change}: point [data] at the same documents, start a fresh run without "
                    f"--resume, or go on with these all the same: --allow-other-data"
                )
            goes_on = "they are read from their start" if what == "train" else "earlier results don't compare"
            self.logs.report(f"allowed: from step {self.state.step} on {change}; {goes_on}")

    # -- ending

    def _say_goodbye(self) -> None:
        report, state, runs_dir = self.logs.report, self.state, self.run_dir.path.parents[1]
        report(f"Peak memory usage: {peak_memory_mib(self.world.device):.2f} MiB")
        report(f"Total training time: {state.training_time / 60:.2f} min")
        best_metric, best_is = self.experiment.checkpoint.best_metric, self.experiment.checkpoint.best_is
        best = best_value(self.run_dir.ledger, best_metric, best_is, state.comparable_from) if best_metric else None
        if best is not None:
            report(f"Best {best_metric}: {best:.4f}")
        report(f"The run is in {self.run_dir.path}: experiment.toml, metrics.jsonl, checkpoints/, samples/")
        other = "" if runs_dir == Path("runs") else f" --runs-dir {runs_dir}"
        run = f"{self.run_dir.name}/{self.run_dir.id}"
        report(f'Next:  nanochat sample {run}{other} "The capital of France is"\n       nanochat runs{other}')


def _remove(run_dir: RunDirectory) -> None:
    """Remove a run's directory, and those above it that are empty then."""
    shutil.rmtree(run_dir.path, ignore_errors=True)
    for parent in (run_dir.path.parent, run_dir.path.parents[1]):
        try:
            parent.rmdir()
        except OSError:
            return
