"""The logger ``tensorboard``. It uses TensorBoard's own library, because torch's writer imports torch."""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from nanochat_core import Logger, LoggerContext, metrics_and_texts
from nanochat_tensorboard.config import TensorBoardConfig


class TensorBoard(Logger):
    """A logger that writes event files: scalars and texts under their metric names, at the step and wall time of the
    record, and the experiment as JSON."""

    rewinds: ClassVar[bool] = True

    def __init__(self, config: TensorBoardConfig, context: LoggerContext) -> None:
        directory = context.directory / "tensorboard"
        if config.directory is not None:
            directory = config.directory / context.name / context.id
        writer: Any = EventFileWriter(str(directory), flush_secs=config.flush_seconds)
        self.writer, self.step, self.context = writer, context.start_step, context
        # A resumed run adds a file; this event makes TensorBoard hide repeated steps in older files.
        start = SessionLog(status=SessionLog.START)
        writer.add_event(Event(wall_time=time.time(), step=context.start_step, session_log=start))
        about = {
            "name": context.name,
            "id": context.id,
            "project": context.project,
            "group": context.group,
            "tags": list(context.tags),
            "experiment": context.experiment,
        }
        about_text = _text("experiment", json.dumps(about, indent=2, default=str))
        writer.add_event(Event(wall_time=time.time(), step=context.start_step, summary=Summary(value=[about_text])))
        writer.flush()

    def log(self, record: Mapping[str, float | str]) -> None:
        metrics, texts = metrics_and_texts(record)
        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in metrics.items()]
        values += [_text(name, text) for name, text in texts.items()]
        self.step = int(record["step"])
        self.writer.add_event(Event(wall_time=float(record["time"]), step=self.step, summary=Summary(value=values)))

    def finish(self, status: Literal["finished", "failed", "preempted"]) -> None:
        values = [_text("status", status)]
        rows = [("step", "evaluator", "metric", "value"), *self.context.evaluations()]
        if rows[1:]:
            values.append(_text("evaluations", "\n".join("\t".join(map(str, row)) for row in rows)))
        self.writer.add_event(Event(wall_time=time.time(), step=self.step, summary=Summary(value=values)))
        self.writer.close()


def _text(name: str, text: str) -> Any:
    """A value whose Markdown shows ``text`` verbatim."""
    verbatim = textwrap.indent(text, "    ", lambda line: True)
    return Summary.Value(
        tag=f"{name}/text_summary",
        metadata=SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text")),
        tensor=TensorProto(
            dtype="DT_STRING",
            string_val=[verbatim.encode()],
            tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
        ),
    )
