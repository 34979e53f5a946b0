"""Options of the evaluator ``lm_eval``."""

from pathlib import Path

import attrs

from nanochat_core import at_least, between, option


@attrs.frozen
class LMEvalConfig:
    """Options of ``lm_eval``."""

    tasks: tuple[str, ...] = option(help="names of tasks of the harness, or of your own tasks in include_path")
    include_path: Path | None = option(None, "directory with task definitions (YAML) of your own")
    num_fewshot: int | None = option(
        None, "number of solved examples in front; default: that of each task", validator=at_least(0, 1000)
    )
    limit: int | None = option(None, "largest number of examples per task", validator=at_least(1, 10**9))
    seed: int = option(1234, "seed of the choice of few-shot examples", validator=between(0, 2**32 - 1))
