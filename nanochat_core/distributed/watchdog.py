"""A thread in each rank that reports stalls, and ends a process that waits for a rank that has failed."""

from __future__ import annotations

import contextlib
import json
import linecache
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection
from types import FrameType

import attrs

from nanochat_core.distributed.store import RankStore

PIPE = "NANOCHAT_LAUNCHER_PIPE"  # file descriptor of a pipe whose other end our launcher holds as long as it lives
LOOK_SECONDS = 0.5
# Seconds that a rank has to end by itself once another has failed. The main rank may be saving, or waiting for loggers.
MAIN_GRACE, OTHERS_GRACE = 20.0, 5.0
POST_SECONDS = 3.0  # seconds that ranks have to post their status


@attrs.frozen
class RankStatus:
    """The activity of a rank's main thread.

    Args:
        text: description of it.
        waits: whether it waits, or may wait, for other ranks.
    """

    text: str
    waits: bool = False

    @classmethod
    def parse(cls, posted: str) -> RankStatus:
        """The status that a rank has posted, or one that says that the text is none."""
        try:
            text, waits = json.loads(posted)
            if isinstance(text, str) and isinstance(waits, bool):
                return cls("".join(c if c.isprintable() else " " for c in text[:500]), waits)
        except (ValueError, TypeError, RecursionError):
            pass
        return cls("says what no rank says")


class Watchdog:
    """A context manager that runs the watchdog's thread.

    - A stall is reported: on the main rank with what every rank is doing, and each rank writes the stacks of its
      threads to its log. It is reported again at doubling intervals, and when it is over.
    - When another rank has failed and this process does not end by itself, the watchdog ends it.
    - When our launcher dies, this process gets a SIGTERM.

    Args:
        rank, size: of this process, and of the world.
        store: the messages between ranks.
    """

    def __init__(self, rank: int, size: int, store: RankStore) -> None:
        self.rank, self.size, self.store = rank, size, store
        self._pipe = int(pipe) if (pipe := os.environ.pop(PIPE, "")) else None
        self._deadline: tuple[float, int] | None = None  # when to end the process, and its exit code
        self._beat = ("", time.monotonic())
        self._stalled: tuple[str, float] | None = None  # the beat after which a stall was reported
        self._patience = self._next = float("inf")
        self._report: Callable[[str], None] = lambda line: None
        self._note: Callable[[str], None] = lambda line: None
        self._packages: Collection[str] = ()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def heartbeat(self, doing: str) -> None:
        """Note progress, and where the rank is now: ``after step 8``, ``in evaluation NAME``. Takes negligible time."""
        self._beat = (doing, time.monotonic())

    def report_stalls(
        self, patience: float, packages: Collection[str], report: Callable[[str], None], note: Callable[[str], None]
    ) -> None:
        """From now on, report when ``heartbeat`` is not called for ``patience`` seconds.

        Args:
            patience: seconds.
            packages: top-level modules whose code a report may name, besides the core.
            report, note: called in the watchdog's thread with a line to print, and with one for this rank's log.
        """
        self._packages, self._report, self._note = {"nanochat_core", *packages}, report, note
        self.heartbeat("at the start")
        self._patience = self._next = patience

    def stop_watching(self) -> None:
        """Report no more stalls: the run is over."""
        self._patience = self._next = float("inf")

    def end_within(self, seconds: float, code: int) -> None:
        """End the process with exit code ``code`` if it still runs after ``seconds``."""
        self._deadline = time.monotonic() + seconds, code

    # -- in the thread

    def _watch(self) -> None:
        while not self._ended.wait(min(LOOK_SECONDS, self._patience / 4)):
            self._look_at_launcher()
            self._look_at_others()
            self._look_at_stall()

    def _look_at_launcher(self) -> None:
        if (
            self._pipe is not None and select.select([self._pipe], [], [], 0)[0]
        ):  # the launcher, which never writes, has ended
            self._pipe = None
            self._note("the launcher has died: stopping as after a signal")
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _look_at_others(self) -> None:
        if self._deadline is None and (failure := self.store.failure()) is not None:
            self.end_within(OTHERS_GRACE if self.rank else MAIN_GRACE, failure.code)
        if self._deadline is not None and time.monotonic() > self._deadline[0]:
            self._note(f"the process is ended with exit code {self._deadline[1]}; its stacks:\n{all_stacks()}")
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            os._exit(self._deadline[1])

    def _look_at_stall(self) -> None:
        beat = self._beat
        if self._stalled is not None and beat is not self._stalled:
            self._next = self._patience
            self.store.post(self.rank, "")
            if self.rank == 0:
                self._report(f"continues after {beat[1] - self._stalled[1]:.0f} s")
            self._stalled = None
        silent = time.monotonic() - beat[1]
        if silent < self._next:
            return
        self._stalled = beat
        self._next *= 2
        here = rank_status(self._packages)
        self.store.post(self.rank, json.dumps(attrs.astuple(here)))
        self._note(f"no progress for {silent:.0f} s {beat[0]}; stacks:\n{all_stacks()}")
        if self.rank == 0:
            takes = (
                f"{beat[0].removeprefix('in ')} takes" if beat[0].startswith("in ") else f"no progress {beat[0]} for"
            )
            self._report(f"{takes} {silent:.0f} s: {self._describe(here)}")

    def _describe(self, here: RankStatus) -> str:
        """The status of all ranks; those that others wait for come first."""
        if self.size == 1:
            return here.text
        found = {0: here}
        end = time.monotonic() + POST_SECONDS
        while len(found) < self.size and time.monotonic() < end:
            for rank in set(range(self.size)) - found.keys():
                if text := self.store.posted(rank):
                    found[rank] = RankStatus.parse(text)
            time.sleep(0.1)
        missing = RankStatus("says nothing")
        groups: dict[RankStatus, list[int]] = {}
        for rank in range(self.size):
            groups.setdefault(found.get(rank, missing), []).append(rank)
        parts = sorted(groups.items(), key=lambda group: group[0].waits)
        return "; ".join(f"{_ranks(ranks)}: {where.text}" for where, ranks in parts)


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


# ---------------------------------------------------------------------------------------------------- stacks

COMPILERS = ("torch._dynamo.convert_frame", "torch._inductor.compile_fx")


def _stack(thread: threading.Thread) -> list[FrameType]:
    """Return the frames of a thread, innermost first."""
    frame = sys._current_frames().get(thread.ident or 0)
    stack = []
    while frame is not None:
        stack.append(frame)
        frame = frame.f_back
    return stack


def all_stacks() -> str:
    """The stacks of all threads but the current one."""
    parts = []
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            lines = traceback.StackSummary.extract((f, f.f_lineno) for f in reversed(_stack(thread))).format()
            parts.append(f"thread {thread.name}:\n{''.join(lines)}")
    return "\n".join(parts)


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _place(stack: list[FrameType], packages: Collection[str], *, leave_out: str = "") -> FrameType | None:
    """The innermost frame in one of the packages, ``leave_out`` excepted."""
    own = (f for f in stack if _module(f).split(".")[0] in packages and _module(f) != leave_out)
    return next(own, None)


def _named(frame: FrameType | None) -> str:
    if frame is None:
        return "code of its own"
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


def rank_status(packages: Collection[str]) -> RankStatus:
    """Return the activity of the main thread, judged by its stack and those of the threads that prepare its data.

    This is a heuristic: it uses names of modules and functions, and assumes that a line with ``.wait()``, ``.item()``
    or similar calls waits. ``py-spy dump --native --pid PID`` shows the exact state, including threads in C; it needs
    privileges that containers often lack, so the watchdog does not use it.
    """
    stack = _stack(threading.main_thread())
    if any(_module(f) == "nanochat_core.data.loader" and f.f_code.co_name == "__next__" for f in stack):
        # The loader's first thread may wait for threads of its lanes.
        threads = [t for t in threading.enumerate() if t.name.startswith("train-loader")]
        places = [
            _place(_stack(t), packages, leave_out="nanochat_core.data.loader")
            for t in sorted(threads, key=lambda t: "lane" not in t.name)
        ]
        return RankStatus(f"waits for training data: {_named(next((p for p in places if p is not None), None))}")
    if any(_module(f) in COMPILERS for f in stack):
        return RankStatus("compiles the model")
    caller = _place(stack, packages, leave_out="nanochat_core.distributed.world")
    operation = next((f.f_code.co_name for f in stack if _module(f) == "torch.distributed.distributed_c10d"), None)
    line = linecache.getline(stack[0].f_code.co_filename, stack[0].f_lineno) if stack else ""
    if operation is not None or ".wait()" in line:
        return RankStatus(f"waits for the other ranks in {operation or 'a collective'} ({_named(caller)})", True)
    if any(call in line for call in (".tolist()", ".item()", "synchronize(")):  # waits for a GPU's collectives too
        return RankStatus(f"waits for the device, and perhaps for other ranks: {_named(caller)}", True)
    return RankStatus(f"is at {_named(caller)}")
