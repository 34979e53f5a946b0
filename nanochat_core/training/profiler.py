"""``[train] profile``: a trace of some optimizer steps, of every rank."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from nanochat_core.distributed.world import World

ROWS = 40  # of a table


class Profiler:
    """A context around the training loop, which calls ``step`` after each optimizer step. Numbers don't change by it.

    The trace goes to ``directory/trace_rank<N>.json.gz``, rank 0's tables of operations to ``directory/summary.txt``.

    Args:
        steps: how many are traced, one after the other; 0: none, and nothing is done.
        after: steps to leave out first, as long as enough come after them.
        ahead: steps that the loop will do.
        report: tells people a line.
    """

    def __init__(
        self, directory: Path, world: World, steps: int, after: int, ahead: int, report: Callable[[str], None]
    ) -> None:
        self.directory, self.world, self.report = directory, world, report
        self.first = min(after, max(ahead - steps, 0))
        self.last = max(min(self.first + steps, ahead) - 1, self.first)
        self.done = 0
        self._torch: profile | None = None
        if steps > 0:
            activities = [ProfilerActivity.CPU]
            if world.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            warmup = min(self.first, 1)  # the step before, in which the profiler gets ready
            with warnings.catch_warnings(action="ignore"):  # a run that is traced from its first step on has none
                steps_of = schedule(
                    wait=self.first - warmup, warmup=warmup, active=self.last + 1 - self.first, repeat=1
                )
            self._torch = profile(activities=activities, schedule=steps_of, on_trace_ready=self._write)

    def __enter__(self) -> Profiler:
        if self._torch is not None:
            self._torch.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._torch is not None:
            self._torch.stop()
            if self.done <= self.first:
                self.report(f"no profile: it was to begin after {self.first} steps, and {self.done} were done")

    def step(self) -> None:
        """An optimizer step is done."""
        self.done += 1
        if self._torch is not None:
            self._torch.step()

    def _write(self, found: profile) -> None:
        steps = min(self.done, self.last + 1) - self.first
        if steps <= 0:  # the run is stopped
            return
        trace = self.directory / f"trace_rank{self.world.rank}.json.gz"
        try:
            self.directory.mkdir(exist_ok=True)
            found.export_chrome_trace(str(trace))
            if self.world.is_main:
                (self.directory / "summary.txt").write_text(self._summary(found), encoding="utf-8")
        except (OSError, RuntimeError) as error:
            self.report(f"the profile can't be written, the run goes on: {error}")
        else:
            many = f"{steps} step{'s' * (steps > 1)}"
            self.report(f"profile of {many}: {trace}, to be opened at ui.perfetto.dev, and summary.txt beside it")

    def _summary(self, found: profile) -> str:
        averages = found.key_averages()
        tables = {"CPU": "self_cpu_time_total"}
        if self.world.device.type == "cuda":
            tables = {"CUDA": "self_device_time_total", **tables}
        return "\n".join(
            f"Operations by their own time on {name}:\n{averages.table(sort_by=key, row_limit=ROWS)}"
            for name, key in tables.items()
        )
