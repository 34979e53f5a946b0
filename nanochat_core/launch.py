"""``--nproc N``: one worker process a device on this machine. Several machines are torchrun's business."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from nanochat_core.trainer import PREEMPTED_EXIT_CODE

GRACE_SECONDS = 60.0  # what other workers get to end by themselves after one has failed


def launch(arguments: Sequence[str], nproc: int) -> int:
    """Run ``python -m nanochat_core ARGUMENTS`` in ``nproc`` worker processes; returns the first failure's exit code.

    SIGTERM, SIGINT and SIGUSR1 are passed on to every worker. Only rank 0 writes to the terminal's stdout.
    """
    from torch.distributed import TCPStore

    # This process holds the rendezvous store on a port the system picked, so that two launches never collide.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threads = str(max((os.cpu_count() or 1) // nproc, 1))
    workers: list[subprocess.Popen[bytes]] = []

    def relay(number: int, _: FrameType | None) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    before: dict[int, Any] = {n: signal.signal(n, relay) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        for rank in range(nproc):
            environment = {
                "OMP_NUM_THREADS": threads,
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(nproc),
                "LOCAL_WORLD_SIZE": str(nproc),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            # A session of its own: a Ctrl-C in the terminal reaches workers once, through us.
            workers.append(
                subprocess.Popen(
                    [sys.executable, "-m", "nanochat_core", *arguments],
                    env=environment,
                    stdout=None if rank == 0 else subprocess.DEVNULL,
                    start_new_session=True,
                )
            )
        return _wait(workers)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(workers: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all workers. After a failure the others get a grace period, then SIGTERM, then SIGKILL."""
    code, deadline, terminated = 0, float("inf"), False
    while any([worker.poll() is None for worker in workers]):  # noqa: C419, all are polled
        for worker in workers:
            if worker.returncode and not code:
                # a worker killed by signal N has returncode -N; a shell would say 128 + N
                code = worker.returncode if worker.returncode > 0 else 128 - worker.returncode
                # Asked to stop, every worker ends by itself; after a failure some may wait for the dead one.
                deadline = time.monotonic() + (GRACE_SECONDS if code == PREEMPTED_EXIT_CODE else 5.0)
        if time.monotonic() > deadline:
            for worker in workers:
                if worker.poll() is None:
                    worker.send_signal(signal.SIGKILL if terminated else signal.SIGTERM)
            terminated, deadline = True, time.monotonic() + GRACE_SECONDS
        time.sleep(0.05)
    for worker in workers:
        if worker.returncode and not code:
            code = worker.returncode if worker.returncode > 0 else 128 - worker.returncode
    return code
