"""Options of the evaluator ``lm_eval``."""

from pathlib import Path

import attrs

from nanochat_core import at_least, option


@attrs.frozen
class LMEvalConfig:
    tasks: tuple[str, ...] = option(help="names of the harness's tasks, or of your own in include_path")
    include_path: Path | None = option(None, "directory with task definitions (YAML) of your own")
    num_fewshot: int | None = option(None, "solved examples in front; absent: as each task says", validator=at_least(0))
    limit: int | None = option(None, "examples of a task at most", validator=at_least(1))
    seed: int = option(1234, "of the choice of few-shot examples")
