"""Keeping loggers out of training's way: scheduling priority of a process and its children."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

import psutil


def lower_priority(yes: bool = True) -> None:
    """Give this process and its children, all threads included, only the CPU time that training leaves; new threads
    inherit that. With ``yes`` False, restore an ordinary priority as far as the system allows, because the machine may
    do other work too.

    Under ``SCHED_IDLE`` a thread of training that wakes up gets its core back at once. With a niceness alone it waits
    for the end of a time slice, some milliseconds, and so do all threads that it works with. The policy applies within
    a session ("autogroup"), so this process stays in the session of training; a child that leads a session of its own
    gets the niceness of a session.

    ``psutil.Process.nice`` sets neither a scheduling policy nor the niceness of threads other than the first, nor that
    of a session. With a niceness alone a busy logger costs training more than it may
    (``benchmarks/logging_overhead.py`` measures it).
    """
    niceness = 19 if yes else 10
    session = os.getsid(0)
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, niceness)
    for pid in family(os.getpid()):
        for thread in _threads(pid):
            with contextlib.suppress(OSError):  # it has ended, or may not restore its priority
                if sys.platform == "linux":
                    policy = os.SCHED_IDLE if yes else os.SCHED_OTHER
                    os.sched_setscheduler(thread, policy, os.sched_param(0))
                os.setpriority(os.PRIO_PROCESS, thread, niceness)
        with contextlib.suppress(OSError):  # it has ended, or the kernel has no autogroups
            if os.getsid(pid) != session:
                _write_with_retries(Path(f"/proc/{pid}/autogroup"), "19" if yes else "0")


def family(pid: int) -> list[int]:
    """Return the ids of a process and its descendants; none when it has ended."""
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def _threads(pid: int) -> list[int]:
    """Ids of a process' threads; none when it has ended."""
    try:
        return [thread.id for thread in psutil.Process(pid).threads()]
    except psutil.Error:
        return []


def _write_with_retries(path: Path, text: str) -> None:
    """Write ``text`` to ``path``; Linux accepts one niceness of a session per 0.1 s, from all processes together."""
    for _ in range(20):
        with contextlib.suppress(BlockingIOError):
            path.write_text(text, encoding="utf-8")
            return
        time.sleep(0.11)
