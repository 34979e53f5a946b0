"""Run directories: ``<runs>/<name>/<id>/``, found by reference, locked while a process trains in them. No torch."""

from __future__ import annotations

import contextlib
import datetime
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from nanochat_core.errors import CheckpointError, ConfigError, Problem, did_you_mean
from nanochat_core.files import LEDGER, expand_path, is_locked, lock_file, rank_log_name, remove, shorten, write_atomic

if TYPE_CHECKING:
    from filelock import AcquireReturnProxy

ID_FORMAT = "%Y%m%d-%H%M%S-%f"
LOCK = "lock"
EXPERIMENT = "experiment.toml"
EVALUATIONS = "evaluations"  # also beside models that belong to no run


@attrs.frozen
class RunDirectory:
    """A run directory, and the names of its files."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.parent.name

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def experiment(self) -> Path:
        return self.path / EXPERIMENT

    @property
    def provenance(self) -> Path:
        return self.path / "provenance.json"

    @property
    def ledger(self) -> Path:
        return self.path / LEDGER

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def evaluations(self) -> Path:
        """Directory of ``nanochat eval``: one directory per evaluation; see ``evaluation/results.py``."""
        return self.path / EVALUATIONS

    @property
    def samples(self) -> Path:
        """Directory of the evaluators' texts, one file per evaluation."""
        return self.path / "samples"

    @property
    def loggers(self) -> Path:
        """Directory of each logger's progress and output."""
        return self.path / "loggers"

    @property
    def profile(self) -> Path:
        """Directory of the traces of ``train.profile``."""
        return self.path / "profile"

    @classmethod
    def of_checkpoint(cls, checkpoint: Path) -> RunDirectory:
        """The run that a checkpoint's directory lies in."""
        return cls(checkpoint.parents[1])

    def diverged(self, step: int) -> Path:
        """File that describes the batch with which training diverged at ``step``."""
        return self.path / f"diverged_step_{step:06d}.json"

    def rank_log(self, rank: int) -> Path:
        return self.path / rank_log_name(rank)

    def read_status(self) -> dict[str, Any]:
        """Return ``status`` (running, finished, failed, preempted, killed), ``step`` and ``num_iterations``; or {}."""
        try:
            status: dict[str, Any] = json.loads(self.status.read_text())
        except (OSError, ValueError):
            return {}
        if status.get("status") == "running" and not self.is_locked():
            status["status"] = "killed"
        return status

    def write_status(self, status: str, step: int, num_iterations: int) -> None:
        content = {"status": status, "step": step, "num_iterations": num_iterations, "time": time.time()}
        write_atomic(self.status, json.dumps(content) + "\n")

    def lock(self) -> AcquireReturnProxy:
        """Lock the run. Keep the returned lock as long as this process trains here; see ``files.lock_file``.

        Raises:
            CheckpointError: when another process trains the run, or the directory can't be written.
        """
        try:
            self.path.stat()  # locking would create a directory again that was removed meanwhile
            return lock_file(self.path / LOCK, timeout=0)
        except TimeoutError:
            who = (self.path / LOCK).read_text(encoding="utf-8").strip()
            raise CheckpointError(
                f"{self.path}: another process is training this run{f' ({who})' if who else ''}; wait for it or stop it"
            ) from None
        except OSError as error:
            raise CheckpointError(
                f"{self.path} can't be written ({error.strerror}): make it writable, or copy it to a writable "
                f"directory and name that with --runs-dir"
            ) from error

    def remove_leftovers(self) -> list[str]:
        """Delete files of processes that were killed while they wrote the run's files; see ``write_atomic``. Returns
        the names. Call under the lock."""
        names = (self.experiment, self.provenance, self.tokenizer, self.status)
        found = sorted(path for name in names for path in self.path.glob(f".{name.name}.*"))
        for path in found:
            remove(path)
        return [path.name for path in found if not path.exists()]

    def is_locked(self) -> bool:
        return is_locked(self.path / LOCK)


def _stamp(id: str) -> datetime.datetime | None:
    try:
        return datetime.datetime.strptime(id, ID_FORMAT)
    except ValueError:
        return None


def create_run(runs_dir: Path, name: str) -> tuple[RunDirectory, AcquireReturnProxy]:
    """Create a run directory under ``runs_dir/name``, and lock it; see ``RunDirectory.lock``.

    Directories of runs that were killed before they recorded anything are deleted.

    Raises:
        ConfigError: when it can't be written.
    """
    try:
        while True:
            (runs_dir / name).mkdir(parents=True, exist_ok=True)
            # Microseconds: ids sort by age, and of two processes that pick the same one the second fails to make it.
            now = datetime.datetime.now()
            stamps = [stamp for p in (runs_dir / name).iterdir() if (stamp := _stamp(p.name)) is not None]
            if stamps and max(stamps) >= now:  # the clock has gone backwards
                now = max(stamps) + datetime.timedelta(microseconds=1)
            run = RunDirectory(runs_dir / name / now.strftime(ID_FORMAT))
            try:
                run.path.mkdir()
                lock = lock_file(run.path / LOCK, timeout=0)
            except (FileExistsError, FileNotFoundError, TimeoutError):  # another start makes or deletes it
                continue
            run.checkpoints.mkdir()
            for stamp in stamps:
                _remove_dead_start(RunDirectory(runs_dir / name / stamp.strftime(ID_FORMAT)))
            return run, lock
    except OSError as error:
        message = f"can't write run directories under {runs_dir} ({error.strerror}): give another with --runs-dir DIR"
        raise ConfigError([Problem("--runs-dir", message)]) from error


def _remove_dead_start(run: RunDirectory) -> None:
    """Delete a run directory in which nothing was trained yet, unless a process is about to."""
    if run.ledger.exists() or any(run.checkpoints.glob("step_*")):
        return
    try:
        run.path.rmdir()  # killed before it had a lock
    except OSError:
        # Its lock may be missing: another start was killed while it deleted this one.
        with contextlib.suppress(OSError), lock_file(run.path / LOCK, timeout=0):
            if not run.ledger.exists():
                remove(run.path)


def all_runs(runs_dir: Path, name: str | None = None) -> list[RunDirectory]:
    """Runs under ``runs_dir``, newest first."""
    if not runs_dir.is_dir():
        return []
    found = runs_dir.glob(f"*/*/{EXPERIMENT}") if name is None else (runs_dir / name).glob(f"*/{EXPERIMENT}")
    return sorted((RunDirectory(p.parent) for p in found), key=lambda r: (r.id, r.name), reverse=True)


def find_run(reference: str, runs_dir: Path) -> RunDirectory:
    """The run that ``reference`` refers to: a run directory, ``name/id``, an id, or a name (its newest run).

    Raises:
        CheckpointError: when there is none; names the runs that exist.
    """
    try:
        expand_path(reference)
    except ValueError as error:
        raise CheckpointError(f"no run can be named {shorten(reference)}: it {error}") from None
    direct = Path(reference)
    for candidate in (direct, runs_dir / reference):
        if RunDirectory(candidate).experiment.is_file():
            return RunDirectory(candidate if candidate.name else candidate.resolve())
    runs = all_runs(runs_dir)
    if Path(reference).name:
        named = [r for r in runs if reference in (r.id, r.name)]
        nested = all_runs(direct.parent, direct.name) if direct.is_dir() else []
        for run in [*named, *nested]:
            return run
    known = sorted({r.name for r in runs} | {r.id for r in runs})
    hint = did_you_mean(reference, known) or (
        f"; there is {', '.join(sorted({r.name for r in runs}))}" if runs else "; there are no runs yet"
    )
    raise CheckpointError(f"no run {shorten(reference)} under {runs_dir}{hint} (list them with: nanochat runs)")
