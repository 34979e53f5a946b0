"""A job of several processes beside strangers: files in its working directory, and processes that reach its ports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
from helpers.waiting import wait_for
from torch.distributed import PrefixStore, TCPStore


def listening(process: psutil.Process) -> set[tuple[str, int]]:
    """Addresses at which a process and its children take connections."""
    family = [process, *process.children(recursive=True)]
    found = [connection for member in family for connection in member.net_connections("inet")]
    return {tuple(c.laddr) for c in found if c.status == psutil.CONN_LISTEN}


def test_strangers_are_kept_out_of_a_job(tiny: Path, tmp_path: Path) -> None:
    for name in ("token", "random", "csv"):  # of the standard library
        (tmp_path / f"{name}.py").write_text("open('executed', 'w').close()\nraise RuntimeError")
    long = ["--set", "train.num_iterations=100000", "--set", "checkpoint.save_every=100000"]
    with (tmp_path / "out").open("wb") as out:
        job = subprocess.Popen(
            [sys.executable, "-P", "-m", "nanochat_core", "run", tiny, "--nproc", "2", *long],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=out,
            stderr=out,
        )
    try:
        wait_for(lambda: "step 00001" in (tmp_path / "out").read_text() or job.poll() is not None, 300)
        launcher = psutil.Process(job.pid)
        workers = [child for child in launcher.children() if "nanochat_core" in child.cmdline()]
        assert len(workers) == 2
        addresses = listening(launcher)
        assert addresses
        assert {host for host, _ in addresses} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
        assert not (tmp_path / "executed").exists()
        # A stranger on this machine writes what no rank writes; the failure that comes then is the one that is told.
        port = int(workers[0].environ()["MASTER_PORT"])
        assert ("127.0.0.1", port) in addresses
        store = PrefixStore("nanochat/0", TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False))
        store.set("failure", "\x1b[2J no number")
        second = next(worker for worker in workers if worker.environ()["RANK"] == "1")
        second.send_signal(signal.SIGKILL)
        assert job.wait(300) == 137
        text = (tmp_path / "out").read_text()
        assert "rank 1 was killed by SIGKILL" in text
        assert "Traceback" not in text
    finally:
        job.kill()
        job.wait()
