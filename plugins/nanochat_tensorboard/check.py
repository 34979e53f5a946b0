"""Whether files can be written, found before a run."""

from __future__ import annotations

from collections.abc import Iterator

from nanochat_core import RunLabels, directory_problem
from nanochat_tensorboard.config import TensorBoardConfig


def check(config: TensorBoardConfig, labels: RunLabels) -> Iterator[tuple[str, str]]:
    """Yield why the directory can't be used."""
    problem = "" if config.directory is None else directory_problem(config.directory / labels.name)
    if problem:
        yield "directory", f"{problem}: give a directory that can be written"
