"""``--nproc N``: one worker process per device on this machine. For several machines use torchrun."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING

import attrs

from nanochat_core.distributed.environment import python_command, python_environment
from nanochat_core.distributed.signals import PATIENT, PREEMPTED_EXIT_CODE, REQUESTS, SAME_SECONDS, stop_signals
from nanochat_core.distributed.store import RankFailure, RankStore
from nanochat_core.distributed.watchdog import PIPE
from nanochat_core.files import rank_log_name

if TYPE_CHECKING:
    from torch.distributed import TCPStore

LOOPBACK = "127.0.0.1"
GRACE_SECONDS = 30.0  # seconds that the other workers have to end after one has failed; longer than the watchdog's
NOW_SECONDS = 2.0  # seconds that workers have to end after a second signal


def launch(arguments: Sequence[str], nproc: int) -> int:
    """Run ``python -m nanochat_core ARGUMENTS`` in ``nproc`` worker processes; returns the first failure's exit code.

    SIGTERM, SIGINT, SIGUSR1, SIGHUP and SIGXCPU are passed on to every worker, which may then take as long as it needs
    to save; a second one ends them. When all have ended, signals have no effect any more: the exit code is theirs.
    Workers notice when this process dies, and stop as after a signal. Only rank 0 writes to the
    terminal's stdout.

    It is not torch's own agent (``torchrun``): that kills workers which take longer than 30 s to save after a signal,
    and its exit code is 1 whatever a worker's was, which hides "stopped, resume me" (75) from job schedulers. Workers
    started by torchrun work too.
    """
    store = _open_store()
    read_end, write_end = os.pipe()  # our end closes when this process ends, in whatever way
    threads = str(max((os.cpu_count() or 1) // nproc, 1))
    launcher = _Launcher(RankStore(store), has_logs=arguments[0] == "run")
    for number in stop_signals():
        signal.signal(number, launcher.relay)
    try:
        for rank in range(nproc):
            environment = {
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
                **_loopback(),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(nproc),
                "LOCAL_WORLD_SIZE": str(nproc),
                "MASTER_ADDR": LOOPBACK,
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                PIPE: str(read_end),
            }
            # A session of its own: a Ctrl-C in the terminal reaches workers once, through us.
            launcher.workers.append(
                subprocess.Popen(
                    python_command("nanochat_core", *arguments),
                    env=python_environment(environment),
                    stdout=None if rank == 0 else subprocess.DEVNULL,
                    start_new_session=True,
                    pass_fds=(read_end,),
                )
            )
        return launcher.wait()
    finally:
        launcher.send(signal.SIGKILL)
        for worker in launcher.workers:
            worker.wait()
        os.close(read_end)
        os.close(write_end)


def _open_store() -> TCPStore:
    """The rendezvous store, which this process holds on a port that the system picks, so that two launches never
    collide. It has no password, so it listens on the loopback interface only; by itself it would on all."""
    from torch.distributed import TCPStore

    listener = socket.create_server((LOOPBACK, 0), backlog=1024)
    port = listener.getsockname()[1]
    return TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def _loopback() -> dict[str, str]:
    """The variable that keeps the ranks' own connections on the loopback interface, unless somebody has set it."""
    name = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    return {} if name is None or "GLOO_SOCKET_IFNAME" in os.environ else {"GLOO_SOCKET_IFNAME": name}


@attrs.define
class _Launcher:
    """The worker processes in rank order, and the signals that were passed on to them."""

    store: RankStore
    has_logs: bool  # ranks have log files, in a run directory
    workers: list[subprocess.Popen[bytes]] = attrs.field(factory=list)
    signalled: float | None = None  # when the first signal was passed on
    deadline: float = float("inf")  # when those that are left are killed

    def relay(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        self.send(number)
        if self.signalled is None:
            self.signalled = now
        elif (
            now > self.signalled + SAME_SECONDS and number not in PATIENT
        ):  # a worker that waits in a collective handles no signal
            self.deadline = min(self.deadline, now + NOW_SECONDS)

    def send(self, number: int) -> None:
        for worker in self.workers:
            if worker.poll() is None:
                worker.send_signal(number)

    def wait(self) -> int:
        """Wait for all workers. After a failure the others get a grace period. Returns the exit code: that of the first
        failure, else that of a stop, else 0."""
        failed, codes = 0, dict[int, int]()
        while len(codes) < len(self.workers):
            for rank, worker in enumerate(self.workers):
                if rank in codes or worker.poll() is None:
                    continue
                # A worker killed by signal N has returncode -N; a shell would say 128 + N.
                codes[rank] = code = worker.returncode if worker.returncode >= 0 else 128 - worker.returncode
                if code in (0, PREEMPTED_EXIT_CODE) or failed:
                    continue
                failed = code
                # Others that find their connections broken are not the first, and wait no longer.
                first = self.store.mark_failure(RankFailure(rank, code))
                if worker.returncode < 0 and self.signalled is None and first.rank == rank:
                    log = f"; its last lines are in {rank_log_name(rank)} of the run directory" * self.has_logs
                    print(_obituary(rank, -worker.returncode) + log, file=sys.stderr, flush=True)
                self.deadline = min(self.deadline, time.monotonic() + GRACE_SECONDS)
            if time.monotonic() > self.deadline:
                self.send(signal.SIGKILL)
            time.sleep(0.05)
        return failed or max(codes.values())


def _obituary(rank: int, number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    why = "a crash in native code, or a plugin that sent it"
    if number == signal.SIGKILL:
        why = "most likely because the machine was out of memory (see dmesg): use fewer workers, or a smaller "
        why += "train.device_batch_size"
    elif number in REQUESTS:
        why = "it was sent to this process only"
    return f"rank {rank} was killed by {name}, {why}"
