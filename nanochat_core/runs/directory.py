"""Run directories: ``<runs>/<name>/<id>/``, found by reference, locked while a process trains in them. No torch."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from nanochat_core.errors import CheckpointError, ConfigError, Problem, did_you_mean
from nanochat_core.files import LEDGER, expand_path, is_locked, rank_log_name, read_json, remove, shorten, write_atomic
from nanochat_core.runs.lock import LOCK, RunLock, lock_run

ID_FORMAT = "%Y%m%d-%H%M%S-%f"
EXPERIMENT = "experiment.toml"
CHECKPOINT = re.compile(r"step_\d{6,18}", re.ASCII)  # longer ones are no step numbers
TEMPORARY = r"\..+\.\d+\.[0-9a-f]{8}"  # names of write_atomic's files
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
    def starting(self) -> Path:
        """File that a fresh run has until it opens its ledger: only such a directory is ever deleted."""
        return self.path / "starting"

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
        """Return ``status`` (running, finished, failed, preempted, killed), ``step``, ``num_iterations`` and ``time``.
        What is missing or of another type is left out."""
        status = {}
        with contextlib.suppress(OSError, ValueError):
            status = _sound_status(read_json(self.status))
        if status.get("status") == "running" and not self.is_locked():
            status["status"] = "killed"
        return status

    def read_provenance(self) -> dict[str, Any]:
        """Return the content of ``provenance.json``; without one, an empty dict. Entries of another type than those
        that we write are left out."""
        try:
            return _provenance(read_json(self.provenance))
        except (OSError, ValueError):
            return {}

    def problems(self) -> list[str]:
        """Return a line for each of ``status.json`` and ``provenance.json`` that is there and not what we write."""
        found = []
        for path, sound in ((self.status, _sound_status), (self.provenance, _provenance)):
            try:
                content = read_json(path)
                if sound(content) != content:
                    found.append(f"{path}: it has entries of unknown types")
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                found.append(f"{path}: {error.strerror if isinstance(error, OSError) else error}")
        return found

    def write_status(self, status: str, step: int, num_iterations: int) -> None:
        content = {"status": status, "step": step, "num_iterations": num_iterations, "time": time.time()}
        write_atomic(self.status, json.dumps(content) + "\n")

    def begin(self) -> None:
        """From now on the directory is never deleted: the run opens its ledger.

        Raises:
            CheckpointError: when the directory can't be written, or is not there any more.
        """
        try:
            self.path.stat()
            self.starting.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.path} can't be written ({error.strerror}): start the run again") from error

    def lock(self) -> RunLock:
        """Lock the run. Keep the lock as long as this process trains here. See ``lock_run`` for errors."""
        return lock_run(self.path)

    def remove_leftovers(self) -> list[str]:
        """Delete files of processes that were killed while they wrote the run's files; see ``write_atomic``. Returns
        the names. Call under the lock."""
        own = "|".join(re.escape(p.name) for p in (self.experiment, self.provenance, self.tokenizer, self.status))
        found = _matching(self.path, rf"\.({own})(\.\d+)?\.[0-9a-f]+|{TEMPORARY}")
        found += _matching(self.samples, TEMPORARY)
        for path in sorted(self.evaluations.glob("*/")):  # nanochat eval, which needs no lock, may be writing
            found += [left for left in _matching(path, TEMPORARY) if not _is_alive(int(left.name.split(".")[-2]))]
        for path in found:
            with contextlib.suppress(OSError):
                remove(path)
        return [path.name for path in found if not path.exists()]

    def is_locked(self) -> bool:
        return is_locked(self.path / LOCK)


def _matching(directory: Path, pattern: str) -> list[Path]:
    """Return the files of a directory whose whole names match; none when it can't be read."""
    try:
        return sorted(path for path in directory.iterdir() if re.fullmatch(pattern, path.name, re.ASCII))
    except OSError:
        return []


def _is_alive(pid: int) -> bool:
    """Whether a process of this machine has the number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _sound_status(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if _is_status(name, value)}


def _provenance(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return provenance without entries that are not of the type that we write."""

    def is_sound(name: str, value: object) -> bool:
        if name in ("plan", "fingerprints", "other_data"):
            if not isinstance(value, dict):
                return False
            texts = value if name == "fingerprints" else {}
            step, before = value.get("from_step", 0), value.get("before", {})
            return (
                all(isinstance(v, str) for v in texts.values()) and isinstance(step, int) and isinstance(before, dict)
            )
        return name != "earlier" or (isinstance(value, list) and all(isinstance(each, dict) for each in value))

    sound = {name: value for name, value in content.items() if is_sound(name, value)}
    if "earlier" in sound:
        sound["earlier"] = [_provenance(each) for each in sound["earlier"]]
    return sound


def _is_status(name: str, value: object) -> bool:
    """Whether an entry of ``status.json`` is one that we write."""
    if name == "status":
        return isinstance(value, str) and value.isprintable() and len(value) < 20
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 2**63:
        return False
    return name == "time" or (name in ("step", "num_iterations") and isinstance(value, int))


def _stamp(id: str) -> datetime.datetime | None:
    try:
        return datetime.datetime.strptime(id, ID_FORMAT)
    except ValueError:
        return None


def create_run(runs_dir: Path, name: str) -> tuple[RunDirectory, RunLock]:
    """Create a run directory under ``runs_dir/name``, and lock it.

    Directories of runs that were killed before they opened their ledger are deleted.

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
                run.starting.touch()
                lock = RunLock(run.path)
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
    with contextlib.suppress(OSError):
        run.path.rmdir()  # killed as soon as it had made the directory
    # Its lock may be missing: another start was killed while it deleted this one.
    if run.starting.is_file():
        with contextlib.suppress(OSError), RunLock(run.path):
            remove_start(run)


def remove_start(run: RunDirectory) -> bool:
    """Delete what a start has made in a run directory that never had a ledger. Anything else that is there stays, and
    the directory with it. Call under the lock. Returns whether the directory is gone.

    It goes by ``starting``, which disappears before a ledger is opened, and is the last file that is deleted here.
    """
    if not run.starting.is_file() or run.ledger.exists() or any(run.checkpoints.glob("*step_*")):
        return False
    with contextlib.suppress(OSError):
        run.checkpoints.rmdir()
    run.remove_leftovers()
    for path in (run.tokenizer, run.experiment, run.provenance, run.log, run.rank_log(1).parent, run.path / LOCK):
        remove(path)
    if {path.name for path in run.path.iterdir()} != {run.starting.name}:
        return False
    remove(run.starting)
    run.path.rmdir()
    return True


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


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint that ``list_checkpoints`` returned."""
    return int(checkpoint.name.removeprefix("step_"))


def list_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints of a run, newest first, not verified."""
    try:
        found = [path for path in directory.iterdir() if CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    except OSError:
        return []
    return sorted(found, key=step_of, reverse=True)
