"""Loggers in processes of their own: whatever they do, training goes on, and nothing is lost or told twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fixtures.install import install_fixture
from support import ROOT, Site

from nanochat_core import LoggerContext
from nanochat_core.follower import Progress, progress_file
from nanochat_core.ledger import rewind_ledger
from nanochat_core.logs import Logs
from nanochat_core.plugins import load_plugins
from nanochat_core.rundir import RunDirectory
from nanochat_core.schema import Choice, LoggerKeys

MOODY = ROOT / "tests" / "fixtures" / "loggers" / "nanochat-moody-logger"


class Run:
    """A run of which only the logging is real."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "runs" / "mine" / "1"
        self.directory.mkdir(parents=True)
        self.logs = Logs(RunDirectory(self.directory))
        self.slowest = 0.0

    def start(self, plugin: str = "moody", timeout: float = 20.0, start_step: int = 0, **options: Any) -> Run:
        entry = load_plugins()["logger"].get(plugin)
        assert entry is not None
        context = LoggerContext(self.directory, "mine", "1", "nanochat", "", (), {}, 10, start_step)
        self.logs.open()
        self.logs.open_ledger()
        choice = Choice(LoggerKeys(plugin, plugin, timeout), entry, entry.config(**options))
        self.logs.start_loggers((choice,), context)
        return self

    def train(self, *steps: int, evaluate: tuple[int, ...] = ()) -> Run:
        for step in steps:
            self._timed(step, {"train/loss": 1.0 / (step + 1)})
            if step + 1 in evaluate:
                self._timed(step + 1, {"evaluator": "bpb", "val/bpb": 2.0})
        return self

    def _timed(self, step: int, values: dict[str, Any]) -> None:
        started = time.perf_counter()
        self.logs.record(step, values)
        self.slowest = max(self.slowest, time.perf_counter() - started)

    def finish(self, status: Any = "finished") -> float:
        started = time.monotonic()
        self.logs.finish(status)
        self.logs.close()
        return time.monotonic() - started

    @property
    def told(self) -> list[tuple[int, str]]:
        """Step and stream of the records the logger was told."""
        return [(line["step"], line.get("evaluator", "")) for line in self.lines if "step" in line]

    @property
    def lines(self) -> list[dict[str, Any]]:
        file = self.directory / "moody.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def said(self) -> list[str]:
        return (self.directory / "log.txt").read_text().splitlines()

    @property
    def progress(self) -> Progress:
        return Progress.read(progress_file(self.directory, "moody"))


@pytest.fixture
def run(site: Site, tmp_path: Path) -> Run:
    install_fixture(MOODY, site.directory)
    return Run(tmp_path)


def wait_for(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_a_logger_mirrors_the_ledger_from_a_process_of_its_own(run: Run) -> None:
    run.start().train(0, 1, 2, evaluate=(2,))
    wait_for(lambda: len(run.told) == 4)  # while the run goes on
    run.train(3).finish()
    first, *records, last = run.lines
    assert first["pid"] != os.getpid()
    assert records == [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    assert last == {"status": "finished"}
    assert run.said == []
    assert run.progress.status == "finished"
    assert "the logger prints" in (run.directory / "loggers" / "moody.log").read_text()


@pytest.mark.parametrize("when", ["start", "log", "finish"])
@pytest.mark.parametrize("how", ["raise", "hang", "die"])
def test_whatever_a_logger_does_training_goes_on(run: Run, when: str, how: str) -> None:
    run.start(timeout=1.0, when=when, how=how).train(0, 1, 2, 3)
    if how == "hang":
        wait_for(lambda: (run.directory / "misbehaved").exists() or when == "finish")
    run.train(4, 5)
    assert run.finish() < 6
    assert run.slowest < 0.2
    assert len((run.directory / "metrics.jsonl").read_text().splitlines()) == 6
    missing = {"start": 6, "log": 4, "finish": 0}[when]
    *reasons, hint = run.said
    reason = {"raise": "don't feel like it", "hang": "took longer than 1 s", "die": "logger moody died (9)"}[how]
    assert len(reasons) == 1, run.said
    assert reason in reasons[0]
    assert f"misses {missing} records" in hint
    assert "nanochat log-sync mine/1 --to moody" in hint
    if how == "hang":  # the log says where
        assert "in _misbehave" in (run.directory / "loggers" / "moody.log").read_text()
    assert run.told == [(step, "") for step in range(6 - missing)]
    # Later it is told what it missed.
    (run.directory / "moody.jsonl").unlink()
    run.start(start_step=6).finish()
    assert run.told == [(step, "") for step in range(6 - missing, 6)]
    assert run.lines[-1] == {"status": "finished"}


def test_a_record_that_raises_is_told_again(run: Run) -> None:
    run.start(when="log", how="once").train(0, 1, 2, 3)
    wait_for(lambda: len(run.told) == 4)
    run.finish()
    assert run.told == [(step, "") for step in range(4)]
    assert run.progress.failures == 1
    assert len(run.said) == 2
    assert "it has every record" in run.said[-1]


def test_a_slow_logger_does_not_slow_training_and_is_ended_at_the_end(run: Run) -> None:
    run.start(timeout=1.0, when="log", how="slow").train(*range(50))
    assert run.slowest < 0.2
    assert run.finish() < 5
    assert 0 < len(run.told) < 50
    assert "took longer than 1 s to send the rest and finish" in run.said[0]
    assert f"misses {50 - len(run.told)} records" in run.said[1]


def test_a_killed_run_ends_as_failed(run: Run, site: Site) -> None:
    script = f"""
import os, signal, sys
sys.path[:0] = [{str(site.directory)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
sys.path.insert(0, {str(ROOT / "tests" / "core")!r})
import test_logs
run = test_logs.Run(Path({str(run.directory)!r})).start().train(0, 1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL
    run.directory = run.directory / "runs" / "mine" / "1"
    wait_for(lambda: run.lines[-1:] == [{"status": "failed"}])
    assert run.told == [(0, ""), (1, "")]


def resume(run: Run, plugin: str) -> None:
    """A run that is killed after step 7 and goes on from its checkpoint of step 4."""
    run.start(plugin).train(0, 1, 2, 3)
    size = run.logs.ledger_bytes()
    run.logs.record(4, {"evaluator": "bpb", "val/bpb": 2.0})
    run.train(4, 5, 6, 7, evaluate=(8,)).finish("failed")
    assert [r["step"] for r in rewind_ledger(run.directory / "metrics.jsonl", size, 4)] == [4]
    run.start(plugin, start_step=4).train(4, 5, 6, 7, 8, 9, evaluate=(8,)).finish()


def test_a_resumed_run_tells_no_step_twice(run: Run) -> None:
    resume(run, "moody")
    before = [(0, ""), (1, ""), (2, ""), (3, ""), (4, "bpb")]
    assert run.told == [*before, (4, ""), (5, ""), (6, ""), (7, ""), (8, "bpb"), (8, ""), (9, "")]
    assert run.said == []


def test_a_logger_that_rewinds_is_told_again_from_the_checkpoint_on(run: Run) -> None:
    resume(run, "moody_rewinding")
    (second,) = [i for i, line in enumerate(run.lines) if line.get("start_step") == 4]
    steps = [(r["step"], r.get("evaluator", "")) for r in run.lines[second:] if "step" in r]
    assert steps == [(4, "bpb"), (4, ""), (5, ""), (6, ""), (7, ""), (8, "bpb"), (8, ""), (9, "")]


def test_a_logger_that_comes_late_is_told_everything(run: Run) -> None:
    run.logs.open()
    run.logs.open_ledger()
    run.train(0, 1, 2).finish("preempted")
    run.start(start_step=3).train(3).finish()
    assert run.lines[0]["start_step"] == 0
    assert run.told == [(step, "") for step in range(4)]


def test_a_line_that_is_not_whole_yet_waits(run: Run) -> None:
    run.start().train(0)
    wait_for(lambda: len(run.told) == 1)
    with (run.directory / "metrics.jsonl").open("ab") as ledger:
        ledger.write(b'{"step": 1, "time"')
        ledger.flush()
        time.sleep(0.7)
        assert len(run.told) == 1
        ledger.write(b': 5.0, "train/loss": 1.0}\n')
    run.finish()
    assert run.told == [(0, ""), (1, "")]


def test_the_processes_import_no_torch(run: Run) -> None:
    program = "import sys, nanochat_core.follower, nanochat_core; nanochat_core.Logger; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_jobs_travel(run: Run) -> None:
    """A context with an experiment of any size, through a file and not a pipe that could fill up."""
    entry = load_plugins()["logger"].get("moody")
    assert entry is not None
    context = LoggerContext(run.directory, "mine", "1", "p", "", (), {"data": {"x": "y" * 200_000}}, 1, 0)
    run.logs.open()
    run.logs.open_ledger()
    run.logs.start_loggers((Choice(LoggerKeys("moody", "moody"), entry, entry.config()),), context)
    run.train(0).finish()
    assert run.told == [(0, "")]
