"""``[train] profile``: a trace of some optimizer steps on every rank."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from nanochat_core.distributed.world import World

ROWS = 40  # of each table in the summary


class Profiler:
    """A context around the training loop, which calls ``step`` after each optimizer step. It does not change results.

    The trace goes to ``directory/trace_rank<N>.json.gz``, rank 0's tables of operations to ``directory/summary.txt``.

    Args:
        steps: number of consecutive steps to trace; 0 turns the profiler off.
        after: number of steps to skip first; fewer are skipped if not enough would follow.
        ahead: number of steps that the loop will run.
        report: prints and logs a line.
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
            warmup = min(self.first, 1)  # the profiler warms up in the step before
            with warnings.catch_warnings(action="ignore"):  # torch warns when there is no warmup step
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
                self.report(f"no profile was written: it starts after {self.first} steps, {self.done} were run")

    def step(self) -> None:
        """Count a completed optimizer step."""
        self.done += 1
        if self._torch is not None:
            self._torch.step()

    def _write(self, profiled: profile) -> None:
        steps = min(self.done, self.last + 1) - self.first
        if steps <= 0:  # the run stopped before the first step to trace
            return
        trace = self.directory / f"trace_rank{self.world.rank}.json.gz"
        try:
            self.directory.mkdir(exist_ok=True)
            profiled.export_chrome_trace(str(trace))
            if self.world.is_main:
                (self.directory / "summary.txt").write_text(self._summary(profiled), encoding="utf-8")
        except (OSError, RuntimeError) as error:
            self.report(f"the profile can't be written, the run continues: {error}")
        else:
            many = f"{steps} step{'s' * (steps > 1)}"
            self.report(f"profile of {many}: {trace} (open it at ui.perfetto.dev), and summary.txt beside it")

    def _summary(self, profiled: profile) -> str:
        averages = profiled.key_averages()
        tables = {"CPU": "self_cpu_time_total"}
        if self.world.device.type == "cuda":
            tables = {"CUDA": "self_device_time_total", **tables}
        return "\n".join(
            f"Operations by their own time on {name}:\n{averages.table(sort_by=key, row_limit=ROWS)}"
            for name, key in tables.items()
        )
