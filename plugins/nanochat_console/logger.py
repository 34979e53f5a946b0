"""The logger ``console``."""

from __future__ import annotations

import math
import statistics
import sys
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

from tqdm import tqdm

from nanochat_console.config import ConsoleConfig
from nanochat_console.lines import evaluation_lines, step_line
from nanochat_core import Logger, LoggerContext, metrics_and_texts

_SMOOTHING = 0.9


class Console(Logger):
    """A logger that prints ledger records to stdout, each line flushed, and a progress bar to stderr on a terminal."""

    def __init__(self, config: ConsoleConfig, context: LoggerContext) -> None:
        self.log_every = config.log_every
        self.num_iterations = context.num_iterations
        self.step_times: deque[float] = deque(maxlen=20)
        self.loss_sum = self.loss_weight = 0.0  # of the moving average
        self.bar: Any = None
        on_terminal = sys.stdout.isatty() and sys.stderr.isatty()
        if on_terminal if config.progress == "auto" else config.progress:
            self.bar = tqdm(
                total=context.num_iterations, initial=context.start_step, unit="step", dynamic_ncols=True, leave=False
            )

    def log(self, record: Mapping[str, float | str]) -> None:
        if "train/loss" in record:
            self._log_step(int(record["step"]), metrics_and_texts(record)[0])
        else:
            for line in evaluation_lines(record):
                self._print(line)

    def finish(self, status: Literal["finished", "failed", "preempted"]) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _log_step(self, step: int, values: dict[str, float]) -> None:
        done = step + 1
        values["train/loss"] = values.get("train/loss_ema", self._smooth(values["train/loss"]))
        if "train/dt" in values:
            # The median of the last steps is not affected by steps that compile or follow an evaluation.
            self.step_times.append(values["train/dt"])
            values["eta"] = (self.num_iterations - done) * statistics.median(self.step_times)
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {values['train/loss']:.4f}", refresh=False)
            self.bar.update(done - self.bar.n)
        if step % self.log_every == 0 or done == self.num_iterations:
            self._print(step_line(step, self.num_iterations, values))

    def _smooth(self, loss: float) -> float:
        """Moving average of the loss, corrected for its start at zero, for records that have none."""
        if math.isfinite(loss):
            self.loss_sum = _SMOOTHING * self.loss_sum + (1 - _SMOOTHING) * loss
            self.loss_weight = _SMOOTHING * self.loss_weight + (1 - _SMOOTHING)
        return self.loss_sum / self.loss_weight if self.loss_weight else loss

    def _print(self, line: str) -> None:
        encoding = sys.stdout.encoding or "utf-8"
        line = line.encode(encoding, errors="replace").decode(encoding)  # a pipe may accept ASCII only
        if self.bar is not None:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
        else:
            print(line, flush=True)
