"""Downloading shards in the background while others are read."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from threading import Condition, Thread
from typing import Any

import attrs
import pyarrow as pa
from tqdm import tqdm

from nanochat_core import DataError
from nanochat_parquet.hub import Hub
from nanochat_parquet.hub_listing import HubFile

PATIENCE = 10.0  # seconds between messages while a reader waits for a file
AHEAD = 8  # shards fetched beyond the last one that was read


def say(line: str) -> None:
    """Print a line to stderr, from one process per machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        tqdm.write(line, file=sys.stderr)  # keeps a progress bar intact


class Downloads:
    """Background downloads: first the files that readers wait for, then the files after the last one that was read.

    Threads start when a file is needed that is not on this machine; they end with the process.

    Args:
        files: in the order in which they are read; the last one is for validation.
        column: name of the column of texts, which must exist.
        workers: number of threads.
        report: prints a message while a reader waits.
    """

    def __init__(
        self, hub: Hub, files: Sequence[HubFile], column: str, workers: int, report: Callable[[str], None] = say
    ) -> None:
        self._hub, self._files, self._column, self._workers, self._report = hub, files, column, workers, report
        self._change = Condition()
        self._paths: dict[int, Path] = {}
        self._failed: dict[int, DataError] = {}
        self._under_way: dict[int, int] = {}  # bytes received so far, by file
        self._requested: list[int] = []
        self._last = -1  # highest index of a training shard that was requested
        self._threads = 0

    def path(self, index: int) -> Path:
        """Path of file ``index`` on this machine, after waiting for its download.

        Raises:
            DataError: when the download fails.
        """
        with self._change:
            self._last = max(self._last, index) if index < len(self._files) - 1 else self._last
            if index not in self._paths:
                path = self._hub.local(self._files[index])
                if path is not None:
                    self._paths[index] = path
            if index in self._paths:
                self._change.notify_all()  # there may be more to fetch now
                return self._paths[index]
            self._failed.pop(index, None)  # the network may be available again
            self._requested += [index, len(self._files) - 1]
            self._start_threads()
            self._change.notify_all()
            started = time.monotonic()
            while index not in self._paths:
                if index in self._failed:
                    raise self._failed[index]
                if not self._change.wait(PATIENCE):
                    file, received = self._files[index], self._under_way.get(index, 0)
                    self._report(
                        f"waiting for {file.name} of {self._hub.repo} for {time.monotonic() - started:.0f} s: "
                        f"{received / 1e6:.1f} of {file.size / 1e6:.1f} MB received"
                    )
            return self._paths[index]

    def _start_threads(self) -> None:
        while self._threads < self._workers:
            Thread(target=self._work, name=f"download-{self._threads}", daemon=True).start()
            self._threads += 1

    def _work(self) -> None:
        while True:
            with self._change:
                index = self._pick()
                while index is None:
                    self._change.wait()
                    index = self._pick()
                self._under_way[index] = 0
            outcome: Path | DataError
            try:
                outcome = self._hub.fetch(self._files[index], self._column, partial(self._count, index))
            except DataError as error:
                outcome = error
            except Exception as error:
                outcome = DataError(f"{self._files[index].name} can't be fetched: {error!r}")
            with self._change:
                del self._under_way[index]
                if isinstance(outcome, Path):
                    self._paths[index] = outcome
                else:
                    self._failed[index] = outcome
                self._change.notify_all()

    def _pick(self) -> int | None:
        """Index of the file to fetch next; None when there is nothing to fetch."""
        ahead = range(self._last, min(self._last + 1 + AHEAD, len(self._files) - 1)) if self._last >= 0 else ()
        for index in (*self._requested, *ahead):
            if index not in self._paths and index not in self._under_way and index not in self._failed:
                return index
        return None

    def _count(self, index: int, received: int) -> None:
        self._under_way[index] = self._under_way.get(index, 0) + received


@attrs.frozen
class ArrivingFile:
    """One of the files of a ``Downloads``. Opening it waits for its download."""

    name: str
    size: int
    index: int
    downloads: Downloads = attrs.field(eq=False, repr=False)

    def open(self) -> pa.NativeFile:
        return pa.OSFile(str(self.downloads.path(self.index)))


def download_all(hub: Hub, files: Sequence[HubFile], column: str, workers: int) -> list[str]:
    """Fetch all files, with a progress bar on a terminal and otherwise a line every 10 seconds.

    Returns:
        One line for each file that could not be fetched: its name and the reason.

    Raises:
        DataError: when files are missing and the hub is not available, or the disk has no room for them.
    """
    missing = [file for file in files if not hub.local(file)]
    total, here = sum(file.size for file in missing), len(files) - len(missing)
    say(f"{hub.repo}: {here} of {len(files)} files are here" + (f", {total / 1e6:,.1f} MB to fetch" if missing else ""))
    if not missing:
        return []
    if hub.offline is not None:
        raise hub.offline
    hub.check_disk_space(missing)
    progress = _Progress(total, len(missing))
    queue, failures = list(missing), dict[str, str]()

    def work() -> None:
        while queue:
            try:
                file = queue.pop(0)
            except IndexError:  # another thread took the last file
                return
            try:
                hub.fetch(file, column, progress.add)
                progress.done(file)
            except Exception as error:
                failures[file.name] = f"{file.name}: {error}"

    threads = [Thread(target=work, daemon=True) for _ in range(min(workers, len(missing)))]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.05)
        progress.show()
    progress.close()
    return [failures[name] for name in sorted(failures)]


class _Progress:
    """Progress of a download in bytes and files, shown as a bar or as lines."""

    EVERY = 10.0  # seconds between lines where stderr is not a terminal

    def __init__(self, total: int, files: int) -> None:
        self._total, self._files = total, files
        self._received = self._done = 0
        self._started = self._shown = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, unit="B", unit_scale=True, desc=f"0/{files} files")

    def add(self, received: int) -> None:
        self._received += received  # only displayed: races between threads don't matter

    def done(self, file: HubFile) -> None:
        self._done += 1
        if self._bar is None:
            say(f"{file.name} is complete ({self._done} of {self._files}; {self._speed()})")

    def show(self) -> None:
        if self._bar is not None:
            self._bar.set_description(f"{self._done}/{self._files} files", refresh=False)
            self._bar.update(self._received - self._bar.n)
        elif time.monotonic() - self._shown > self.EVERY:
            self._shown = time.monotonic()
            say(f"{self._received / 1e6:,.1f} of {self._total / 1e6:,.1f} MB ({self._speed()})")

    def _speed(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-3)
        speed = max(self._received, 0) / seconds
        left = (self._total - self._received) / speed if speed > 0 else float("inf")
        return f"{speed / 1e6:.1f} MB/s" + (f", {left:.0f} s left" if 0 < left < 1e6 else "")

    def close(self) -> None:
        self.show()
        if self._bar is not None:
            self._bar.close()
