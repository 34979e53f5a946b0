"""A run on one rank: the order of its phases, the handling of failures, and its end."""

from __future__ import annotations

import contextlib
import faulthandler
import shlex
import traceback
from pathlib import Path

import attrs

from nanochat_core.config.load import LoadedExperiment
from nanochat_core.config.origins import add_places
from nanochat_core.distributed.failures import Failures
from nanochat_core.distributed.signals import PREEMPTED_EXIT_CODE, Stopped, StopRequest
from nanochat_core.distributed.store import RankFailure, RankStore
from nanochat_core.distributed.watchdog import Watchdog
from nanochat_core.distributed.world import OtherRankFailed, World, join_world, leave_world
from nanochat_core.errors import CheckpointError, NanochatError, PluginError
from nanochat_core.hardware.machine import determinism, keep_freed_memory, peak_flops, peak_memory_mib
from nanochat_core.loggers.observers import observer_choices
from nanochat_core.loggers.run_log import Logs, Status
from nanochat_core.planning.banner import format_plan
from nanochat_core.planning.out_of_memory import OutOfMemory, is_out_of_memory
from nanochat_core.planning.probe import settle_batch_size
from nanochat_core.plugins.calls import blame
from nanochat_core.plugins.discovery import Plugins
from nanochat_core.runs.checkpoint import (
    load_checkpoint,
    remove_leftovers,
)
from nanochat_core.runs.ledger import best_value
from nanochat_core.runs.state import TrainState
from nanochat_core.training.build import build_parts, build_saver, seed
from nanochat_core.training.checkpoints import Checkpoints
from nanochat_core.training.ending import RunDisplaced, write_rescued
from nanochat_core.training.prepare import Setup, prepare
from nanochat_core.training.request import RunRequest
from nanochat_core.training.run_files import logger_context, remove_run
from nanochat_core.training.trainer import Trainer

LAST_SECONDS = 5.0  # how long a stopped and saved run waits for reads in progress


def run_experiment(
    request: RunRequest, stop: StopRequest, loaded: tuple[Plugins, LoadedExperiment] | None = None
) -> int:
    """Run an experiment on this rank of the world that the environment describes. Returns the exit code.

    Args:
        stop: receives the signals that request a stop.
        loaded: result of ``request.load``, if this process has called it already; otherwise rank 0 calls it.

    Raises:
        NanochatError: for an error that the user can correct. With several ranks nothing is raised: the first failure
            is shown, and all ranks return its exit code.
        Stopped: when a stop is requested before training has begun.
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
                    setup = world.on_main(lambda: prepare(request, *(loaded or request.load()), world, exit_stack))
                    if setup is None:
                        return 0
                    planned = settle_batch_size(setup.planned, world)
                with determinism(planned.experiment.train.deterministic):
                    return Session(attrs.evolve(setup, planned=planned), world, failures, watchdog, stop).run()
        except OtherRankFailed as failure:
            return failure.exit_code
        except Stopped:
            store.mark_failure(RankFailure(world.rank, PREEMPTED_EXIT_CODE))  # others may wait for this rank
            watchdog.end_within(LAST_SECONDS, PREEMPTED_EXIT_CODE)
            raise
        except BaseException as raised:
            error = blame(raised) or raised
            if world.size == 1:
                if error is raised:
                    raise
                raise error from raised
            return failures.report_once(error)
        finally:
            leave_world()


class Session:
    """One rank's part of a run: it opens, builds and trains the run, and closes it whatever happens."""

    def __init__(self, setup: Setup, world: World, failures: Failures, watchdog: Watchdog, stop: StopRequest) -> None:
        self.planned, self.plan, self.experiment = setup.planned, setup.planned.plan, setup.planned.experiment
        self.setup, self.run_dir, self.world = setup, setup.run_dir, world
        self.failures, self.watchdog, self.stop = failures, watchdog, stop
        self.logs = Logs(self.run_dir)
        self.state = TrainState()
        self.checkpoints: Checkpoints | None = None

    def run(self) -> int:
        """Build everything, train, and close everything. Returns the exit code."""
        self.world.on_main(self.open)
        if not self.world.is_main:
            self.failures.terminal = self.logs.open_rank(self.world.rank)
        if self.world.size > 1:
            faulthandler.enable()  # a crash in native code writes its stacks to this rank's log
        status: Status = "failed"
        with contextlib.ExitStack() as last:
            try:
                with self.stop.interruptible():
                    trainer = self.build()
                last.enter_context(trainer.parts.loader)  # closed last: it waits for a read in progress
                self.logs.report(f"run directory {self.run_dir.path}")
                status = trainer.fit()
                self._report_data_problems(trainer)
            except Stopped:
                status = "preempted"
                raise
            except BaseException as raised:  # a plugin may raise anything, such as SystemExit
                error = self._failed(raised)
                if error is raised:
                    raise
                raise error from raised
            finally:
                self.watchdog.stop_watching()
                self.close(status)
            code = PREEMPTED_EXIT_CODE if status == "preempted" else 0
            self.world.barrier()  # the launcher may end all ranks once the first has ended
            if code:
                self.watchdog.end_within(LAST_SECONDS, code)
        return code

    def open(self) -> None:
        """Open the log, and remove temporary files that a killed process left. Called on rank 0."""
        self.logs.open()
        for name in (*self.run_dir.remove_leftovers(), *remove_leftovers(self.run_dir.checkpoints)):
            self.logs.note(f"removed {name}, which a killed process left")
        self.logs.note(format_plan(self.planned))

    def build(self) -> Trainer:
        """Build the run, then start the ledger and its loggers. Collective."""
        world, logs = self.world, self.logs
        content = load_checkpoint(self.setup.checkpoint) if self.setup.checkpoint is not None else None
        if content is not None:
            self.state = content.state
        parts = build_parts(self.setup, content, self.state, world, logs, self.stop, self.watchdog.heartbeat)
        peak, how = peak_flops(world.device, self.plan.torch_dtype)
        logs.report(
            f"peak {peak / 1e12:.3g} TFLOP/s per device ({how}); {self.state.lanes} data lanes; "
            f"validation data {self.state.fingerprints['val'][:12]}"
        )
        world.barrier()  # a run that a rank can't build leaves no files
        if world.is_main:
            logs.open_ledger()
            logs.status("running", self.state.step, self.plan.num_iterations)
            observers = observer_choices(self.setup.observers)
            context = logger_context(self.planned, self.run_dir, self.state.step)
            logs.start_loggers((*self.experiment.loggers, *observers), context)
        packages = self.experiment.packages()
        self.watchdog.report_stalls(self.experiment.train.stall_warning, packages, logs.report, logs.note)
        saver = build_saver(self.setup, self.state, world, logs.report)
        checkpoints = self.checkpoints = Checkpoints(
            saver,
            parts,
            self.planned,
            world,
            logs,
            self.stop,
            self.setup.lock,
            lambda run_dir: write_rescued(run_dir, self.setup, parts, logs.report),
        )
        seed(content, self.experiment.train.seed, self.state, world)  # last: building may have drawn random numbers
        return Trainer(
            planned=self.planned,
            world=world,
            run_dir=self.run_dir,
            parts=parts,
            checkpoints=checkpoints,
            logs=logs,
            stop=self.stop,
            heartbeat=self.watchdog.heartbeat,
        )

    def close(self, status: Status) -> None:
        """Record and print how the run ended. Does nothing on ranks other than 0."""
        if not self.world.is_main:
            return
        if self.checkpoints is not None:
            self.checkpoints.displaced()  # then the rest is written where the directory is now
        if self.logs.has_ledger:
            self.logs.status(status, self.state.step, self.plan.num_iterations)
            self.logs.finish(status)  # after the status is recorded, because it waits for loggers
            if status == "finished":
                self._print_summary()
        self.logs.close()
        lock = self.setup.lock
        if self.setup.checkpoint is None and not self.logs.began and lock is not None and not lock.lost():
            remove_run(self.run_dir)  # this process made it, and has recorded nothing in it
        if self.checkpoints is not None and self.checkpoints.lock is not None:
            self.checkpoints.lock.release()  # perhaps of another directory than that of the start

    def _failed(self, error: BaseException) -> BaseException:
        """Log why the run fails, before waiting for or closing anything. Returns the exception to raise."""
        self.watchdog.stop_watching()
        error = blame(error) or error
        if isinstance(error, PluginError) and error.__cause__ is not None:
            self.logs.note("".join(traceback.format_exception(error.__cause__)))
        if isinstance(error, OtherRankFailed):
            return error
        lost = self.setup.lock.lost() if self.setup.lock is not None and self.checkpoints is None else ""
        if lost and isinstance(error, OSError | CheckpointError):
            error = RunDisplaced(f"{self.run_dir.path} {lost} before the run began: start it again")
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

    def _report_data_problems(self, trainer: Trainer) -> None:
        by_rank = self.world.all_gather_object(list(trainer.parts.source.problems()))
        problems = sorted({line for lines in by_rank for line in lines})
        if problems:
            text = "places in the data could not be read and were skipped; see log.txt"
            self.logs.report(f"{len(problems)} {text}")

    def _print_summary(self) -> None:
        report, state, runs_dir = self.logs.report, self.state, self.run_dir.path.parents[1]
        report(f"Peak memory usage: {peak_memory_mib(self.world.device):.2f} MiB")
        report(f"Total training time: {state.training_time / 60:.2f} min")
        best_metric, best_is = self.experiment.checkpoint.best_metric, self.experiment.checkpoint.best_is
        best = best_value(self.run_dir.ledger, best_metric, best_is, state.comparable_from) if best_metric else None
        if best is not None:
            report(f"Best {best_metric}: {best:.4f}")
        report(f"The run is in {self.run_dir.path}: experiment.toml, metrics.jsonl, checkpoints/, samples/")
        other = "" if runs_dir == Path("runs") else f" --runs-dir {shlex.quote(str(runs_dir))}"
        run = shlex.quote(f"{self.run_dir.name}/{self.run_dir.id}")
        report(f'Next:  nanochat sample {run}{other} "The capital of France is"\n       nanochat runs{other}')
