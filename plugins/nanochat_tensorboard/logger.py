"""Event files for TensorBoard."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch.utils.tensorboard import SummaryWriter

from nanochat_core import Logger, LoggerContext
from nanochat_tensorboard.config import TensorBoardConfig

_NOT_FINITE = ("nan", "inf", "-inf")  # JSON has no such numbers, so the ledger writes words


class TensorBoard(Logger):
    """Scalars and texts under their metric names, at the step and wall time of the record; the experiment as JSON."""

    rewinds: ClassVar[bool] = True

    def __init__(self, config: TensorBoardConfig, context: LoggerContext) -> None:
        directory = context.directory / "tensorboard"
        if config.directory is not None:
            directory = config.directory / context.name / context.id
        # A resumed run writes one more file there; TensorBoard hides what older files say about steps done again.
        writer: Any = SummaryWriter(str(directory), purge_step=context.start_step, flush_secs=config.flush_seconds)
        self.writer = writer
        about = {
            "name": context.name,
            "id": context.id,
            "project": context.project,
            "group": context.group,
            "tags": list(context.tags),
            "experiment": context.experiment,
        }
        writer.add_text("experiment", _verbatim(json.dumps(about, indent=2, default=str)), context.start_step)
        writer.flush()

    def log(self, record: Mapping[str, float | str]) -> None:
        step, time = int(record["step"]), float(record["time"])
        for name, value in record.items():
            if name in ("step", "time", "evaluator"):
                continue
            if isinstance(value, str) and value not in _NOT_FINITE:
                self.writer.add_text(name, _verbatim(value), step, walltime=time)
            else:
                self.writer.add_scalar(name, float(value), step, walltime=time)

    def finish(self, status: Literal["finished", "failed", "preempted"]) -> None:
        self.writer.close()


def _verbatim(text: str) -> str:
    """Markdown that shows ``text`` as it is."""
    return textwrap.indent(text, "    ", lambda line: True)
