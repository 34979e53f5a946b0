"""Options of the evaluator ``bpb``."""

from pathlib import Path
from typing import Any, Literal

import attrs

from nanochat_core import at_least, option


def _is_there(_: Any, attribute: Any, value: Path) -> None:
    if not value.exists():
        raise ValueError(f"{value} does not exist")


def _different_names(_: Any, attribute: Any, value: tuple["TextSet", ...]) -> None:
    names = [each.name for each in value]
    if len({*names, "val", "train"}) < len(names) + 2:
        raise ValueError(f"need names of their own, other than val and train, not {', '.join(names)}")


@attrs.frozen
class TextSet:
    """Texts besides the run's own."""

    name: str = option(help="the metric is named <name>/bpb")
    path: Path = option(
        help="a .txt file (one document), a directory of them, a .jsonl or .parquet file with texts in `text`",
        validator=_is_there,
    )


@attrs.frozen
class BpbConfig:
    eval_tokens: int = option(
        20 * 524288, "how many tokens of each set to look at; fewer if it has fewer", validator=at_least(1)
    )
    split: Literal["val", "train", "both", "none"] = option(
        "val", "which of the run's documents; the metric is named <split>/bpb"
    )
    sets: tuple[TextSet, ...] = option(
        (), 'other texts, as in sets = [{name = "code", path = "code.jsonl"}]', validator=_different_names
    )
