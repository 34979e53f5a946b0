"""Options of the evaluator ``core``."""

from pathlib import Path
from typing import Literal

import attrs

from nanochat_core import at_least, option


@attrs.frozen
class CoreConfig:
    """Options of ``core``."""

    bundle: Path | None = option(
        None, "directory or zip of the tasks; default: the public bundle (162 MB), downloaded once into NANOCHAT_HOME"
    )
    tasks: tuple[str, ...] = option((), "labels of the tasks to evaluate; empty: all tasks in the bundle's core.yaml")
    max_per_task: int | Literal["all"] = option(
        500, 'largest number of examples per task, or "all"', validator=at_least(1, 10**9)
    )
    max_len: Literal["unlimited", "model"] = option(
        "unlimited",
        "longest prompt: ten times the training length (unlimited) or the training length (model); longer prompts lose "
        "their beginning",
    )
    batch_tokens: int | Literal["auto"] = option(
        "auto", "tokens per forward pass; auto: 32768, on a CPU 4096", validator=at_least(1, 2**24)
    )
