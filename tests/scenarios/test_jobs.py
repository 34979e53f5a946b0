"""What starts the ranks: our launcher, torchrun, Slurm. Signals, slow saves, launchers that die, jobs in a loop."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed
from helpers.processes import Process
from helpers.support import ROOT, Site, assert_same_end, ledger, only_run

from nanochat_core.runs.checkpoint import verify

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc"),
]

# An fsync takes as long as a file is there.
SLOW = """
import os, time
real = os.fsync
def fsync(fd):
    while os.path.exists({gate!r}):
        open({gate!r} + ".reached", "w").close()
        time.sleep(0.01)
    real(fd)
os.fsync = fsync
"""


@pytest.fixture
def long(tiny: Path) -> Path:
    """``tiny`` without an end."""
    tiny.write_text(tiny.read_text().replace("num_iterations = 12", "num_iterations = 100000"))
    return tiny


def has_trained(runs: Path, steps: int = 3) -> Callable[[], bool]:
    return lambda: bool(list(runs.glob("*/*/metrics.jsonl"))) and len(ledger(only_run(runs))) >= steps


def goes_on(runs: Path, times: int, step: int) -> Callable[[], bool]:
    """It was resumed so often, and stands behind ``step`` again."""
    started = only_run(runs) / "log.txt"
    return lambda: started.read_text().count("run directory") > times and len(ledger(only_run(runs))) > step + 3


def status(runs: Path) -> str:
    found: str = json.loads((only_run(runs) / "status.json").read_text())["status"]
    return found


def test_the_launcher_waits_for_a_slow_save_and_does_not_outlive_its_workers(long: Path, tmp_path: Path) -> None:
    gate, reached, runs = tmp_path / "gate", tmp_path / "gate.reached", tmp_path / "runs"
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(SLOW.format(gate=str(gate)))

    def start() -> Process:
        words = (long, "--runs-dir", runs, "--nproc", 2, "--resume", "auto", "--set", "checkpoint.save_every=100000")
        return Process.run(*words, site=tmp_path / "site")

    with start() as process:  # told to stop, it saves, however long that takes
        process.wait_for(has_trained(runs))
        gate.touch()
        process.process.send_signal(signal.SIGTERM)
        process.wait_for(reached.exists)
        time.sleep(2.5)
        assert process.process.poll() is None
        gate.unlink()
        code, _, err = process.end()
    assert code == 75, err
    (checkpoint,) = (only_run(runs) / "checkpoints").glob("step_*")
    assert verify(checkpoint) == ""
    saved = int(checkpoint.name[5:])

    reached.unlink()
    with start() as process:  # told twice, it ends at once
        process.wait_for(goes_on(runs, 1, saved))
        gate.touch()
        process.process.send_signal(signal.SIGTERM)
        process.wait_for(reached.exists)
        time.sleep(1.2)  # within a second it would be the same request
        process.process.send_signal(signal.SIGTERM)
        code, _, err = process.end()
    assert code == 128 + signal.SIGTERM, err
    gate.unlink()

    with start() as process:  # killed, its workers stop as if they had been told to
        process.wait_for(goes_on(runs, 2, saved))
        process.process.kill()
        process.end()
    assert status(runs) == "preempted"
    assert len(list((only_run(runs) / "checkpoints").glob("step_*"))) == 2


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


RAISES = """
from nanochat_core import Evaluation, Evaluator

class Raises(Evaluator):
    def __init__(self, config, context):
        if context.world.rank == 1: raise RuntimeError("no good")
    def evaluate(self, model, step): return Evaluation()

@hookimpl
def nanochat_register_evaluators(registry):
    registry.add("raises", config=Config, factory="made_up.plugin:Raises")
"""


def test_torchrun_on_two_nodes(site: Site, on_two_ranks: tuple[Path, Path], tmp_path: Path) -> None:
    """Both on this machine. First a rank raises; then it trains, to what our launcher gives."""
    site.add("made-up", RAISES)
    file, run = on_two_ranks
    runs = tmp_path / "runs"

    def on_both(*words: object) -> list[tuple[int, str, str]]:
        endpoint = f"127.0.0.1:{free_port()}"
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "test"]
        command += ["--local-addr", "127.0.0.1", "-m", "nanochat_core", "run", file, "--runs-dir", runs, *words]
        with Process(command, site.directory) as first, Process(command, site.directory) as second:
            return [first.end(), second.end()]

    failed = on_both("--set", "evaluators.raises.plugin=raises")
    assert [code for code, _, _ in failed] == [1, 1]
    errors = "".join(err for _, _, err in failed)
    assert errors.count("rank 1: evaluator 'raises'") == 1
    assert not runs.exists()

    trained = on_both("--resume", "auto")
    assert [code for code, _, _ in trained] == [0, 0], trained
    assert "".join(out for _, out, _ in trained).count("step 00007/00100") == 1
    assert (only_run(runs) / "logs/rank_001.txt").exists()
    assert_same_end(only_run(runs), run)


# What the script asks of Slurm. Tasks are started like Slurm's: their own environment, signalled by the system.
SRUN = """#!/bin/bash
[[ "$1 $2 $3" == "--gpu-bind=none --kill-on-bad-exit=0 --wait=60" ]] || exit 64
shift 3
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
echo $first $second > tasks
trap : TERM USR1
most=0
for task in $first $second; do
  while wait $task; code=$?; kill -0 $task 2>/dev/null; do :; done
  (( code > most )) && most=$code
done
exit $most
"""
SCONTROL = """#!/bin/bash
if [[ "$1" == show ]]; then echo 127.0.0.1; echo other; else echo "$@" >> requeued; fi
"""


def test_a_slurm_job_goes_back_into_the_queue_and_on(on_two_ranks: tuple[Path, Path], tmp_path: Path) -> None:
    file, run = on_two_ranks
    (tmp_path / "bin").mkdir()
    nanochat = f'#!/bin/sh\nexec "{sys.executable}" -m nanochat_core "$@"\n'
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL), ("nanochat", nanochat)):
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(stat.S_IRWXU)
    # The port is made from the job's number.
    environment = {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": str(20000 * 3 + free_port() % 20000), "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "2",
    }  # fmt: skip
    script = ["env", "-C", tmp_path, "bash", ROOT / "experiments/slurm/run.sbatch", file]
    runs = tmp_path / "runs"
    with Process(script, env=environment) as job:
        job.wait_for(has_trained(runs))
        for task in (tmp_path / "tasks").read_text().split():
            os.kill(int(task), signal.SIGUSR1)
        os.kill(job.process.pid, signal.SIGTERM)  # to the batch script as well
        code, _, err = job.end()
    assert code == 75, err
    assert (tmp_path / "requeued").read_text() == f"requeue {environment['SLURM_JOB_ID']}\n"
    assert status(runs) == "preempted"
    with Process(script, env=environment) as job:
        code, _, err = job.end()
    assert code == 0, err
    assert (tmp_path / "requeued").read_text().count("\n") == 1
    assert_same_end(only_run(runs), run)
