"""Options of the evaluator ``core``."""

from pathlib import Path
from typing import Literal

import attrs

from nanochat_core import at_least, option


@attrs.frozen
class CoreConfig:
    bundle: Path | None = option(
        None, "directory or zip of the tasks; absent: the public one (162 MB), downloaded once into NANOCHAT_HOME"
    )
    tasks: tuple[str, ...] = option((), "only these tasks; empty: all that the bundle's core.yaml lists")
    max_per_task: int | Literal["all"] = option(500, 'examples of a task at most, or "all"', validator=at_least(1))
    max_len: Literal["unlimited", "model"] = option(
        "unlimited",
        "longest prompt: ten times the training length, or the training length; of longer ones the end is kept",
    )
    batch_tokens: int | Literal["auto"] = option(
        "auto", "tokens of a forward pass; auto: 32768, on a CPU 4096", validator=at_least(1)
    )
