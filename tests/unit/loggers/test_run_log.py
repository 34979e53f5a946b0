"""Loggers in processes of their own: whatever they do, training goes on, and nothing is lost or told twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.install import install_fixture
from helpers.logging_run import Run
from helpers.support import ROOT, Site, losses, only_run
from helpers.waiting import wait_for

from nanochat_core import LoggerContext
from nanochat_core.plugins.choice import Choice, LoggerKeys
from nanochat_core.plugins.discovery import load_plugins
from nanochat_core.runs.ledger import rewind_ledger

TIMEOUT = 10.0  # seconds of a logger that hangs: longer than its process takes to start on a busy machine

MOODY = ROOT / "tests" / "fixtures" / "loggers" / "nanochat-moody-logger"


@pytest.fixture
def run(site: Site, tmp_path: Path) -> Run:
    install_fixture(MOODY, site.directory)
    return Run(tmp_path)


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
    run.start(timeout=TIMEOUT if how == "hang" else 300.0, when=when, how=how).train(0, 1, 2, 3)
    if how == "hang":  # for longer than this test may take
        wait_for(lambda: len(run.told) == 4 if when == "finish" else (run.directory / "misbehaved").exists())
    run.train(4, 5)
    run.finish()
    assert len((run.directory / "metrics.jsonl").read_text().splitlines()) == 6
    missing = {"start": 6, "log": 4, "finish": 0}[when]
    *reasons, hint = run.said
    reason = {"raise": "don't feel like it", "hang": f"took longer than {TIMEOUT:g} s", "die": "logger moody died (9)"}[
        how
    ]
    assert len(reasons) == 1, run.said
    assert reason in reasons[0]
    assert f"missed {missing} records" in hint
    assert "nanochat log-sync mine/1 --to moody" in hint
    if how == "hang":  # the log says where
        assert "in _misbehave" in (run.directory / "loggers" / "moody.log").read_text()
    assert run.told == [(step, "") for step in range(6 - missing)]
    # Later it is told what it missed.
    (run.directory / "moody.jsonl").unlink()
    run.start(start_step=6).finish()
    assert run.told == [(step, "") for step in range(6 - missing, 6)]
    assert run.lines[-1] == {"status": "finished"}


@pytest.mark.parametrize(
    ("when", "how", "reason"),
    [
        ("start", "leave", "has ended its process by itself before it was complete (exit code 0)"),
        ("log", "leave", "has ended its process by itself before it was complete (exit code 0)"),
        ("finish", "leave", "has ended its process by itself before it was complete (exit code 0)"),
        ("log", "fail", "died (1)"),  # the watchdog's code, but not the watchdog
        ("log", "exit", "SystemExit: 0"),
        ("finish", "interrupt", "KeyboardInterrupt"),
    ],
)
def test_a_logger_that_ends_its_process_is_not_complete(run: Run, when: str, how: str, reason: str) -> None:
    run.start(when=when, how=how, timeout=60.0).train(0, 1, 2, 3).finish()
    told, hint = run.said
    assert reason in told
    missed = {"start": 4, "log": 2, "finish": 0}[when]
    assert f"missed {missed} records" in hint
    run.start(start_step=4, timeout=60.0).finish()
    assert run.told == [(step, "") for step in range(4)]


def test_what_a_logger_reports_is_bounded_and_printable(run: Run) -> None:
    run.start(when="start", how="report", timeout=60.0).train(0).finish()
    assert run.told == [(0, "")]
    assert len(run.said) < 100
    assert all(line.isprintable() and len(line) < 2000 for line in run.said)
    assert "further lines" in run.said[-1]


def test_a_record_that_raises_is_told_again(run: Run) -> None:
    run.start(when="log", how="once").train(0, 1, 2, 3)
    wait_for(lambda: len(run.told) == 4)
    run.finish()
    assert run.told == [(step, "") for step in range(4)]
    assert run.progress.failures == 1
    assert len(run.said) == 2
    assert "it has every record" in run.said[-1]


def test_a_slow_logger_does_not_slow_training_and_is_ended_at_the_end(run: Run) -> None:
    run.start(timeout=TIMEOUT, when="log", how="slow").train(*range(200))  # it takes 0.3 s for each
    assert len(run.told) < 199
    wait_for(lambda: run.told)
    run.finish()
    assert 0 < len(run.told) < 200
    assert f"took longer than {TIMEOUT:g} s to send the rest and finish" in run.said[0]
    assert f"missed {200 - len(run.told)} records" in run.said[1]


@pytest.mark.parametrize("before", ["", "if os.fork() == 0: time.sleep(30), os._exit(0)  # it keeps the pipe open"])
def test_a_killed_run_ends_as_failed(run: Run, site: Site, before: str) -> None:
    script = f"""
import os, signal, sys, time
sys.path[:0] = [{str(site.directory)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
from helpers.logging_run import Run
run = Run(Path({str(run.directory)!r})).start().train(0, 1)
{before}
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL
    run.directory = run.directory / "runs" / "mine" / "1"
    wait_for(lambda: run.lines[-1:] == [{"status": "failed"}])
    assert run.told == [(0, ""), (1, "")]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")
def test_a_logger_gives_way_to_training(run: Run) -> None:
    autogroup = Path("/proc/self/autogroup")
    own = autogroup.read_text() if autogroup.exists() else ""
    run.start().train(0)
    wait_for(lambda: len(run.told) == 1)
    process = Path(f"/proc/{run.lines[0]['pid']}")
    threads = [int(thread.name) for thread in process.glob("task/*")]
    assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads} == {19}
    assert {os.sched_getscheduler(thread) for thread in threads} == {os.SCHED_IDLE}
    assert os.getsid(int(process.name)) == os.getsid(0)  # in another session it would not give way
    assert os.getpgid(int(process.name)) != os.getpgid(0)  # a Ctrl-C is not for it
    if (process / "autogroup").exists():
        assert (process / "autogroup").read_text() == own
    run.finish()


def test_a_terminal_that_goes_away_stops_nothing(tiny: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nanochat_core", "run", str(tiny), "--runs-dir", str(tmp_path / "runs")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith("step 00001"))
        process.stdout.close()
        assert process.wait(300) == 0
    assert set(losses(only_run(tmp_path / "runs"))) == set(range(12))


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
    program = (
        "import sys, nanochat_core.loggers.worker, nanochat_core; nanochat_core.Logger; print('torch' in sys.modules)"
    )
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
