"""Options of the evaluator ``bpb``."""

import os
from pathlib import Path
from typing import Any, Literal

import attrs

from nanochat_core import at_least, option, shorten


def _exists(_: Any, attribute: Any, value: Path) -> None:
    if not os.path.lexists(value):  # what it is is found out when it is read
        raise ValueError(f"{shorten(str(value))} does not exist")


def _different_names(_: Any, attribute: Any, value: tuple["TextSet", ...]) -> None:
    names = [each.name for each in value]
    if len({*names, "val", "train"}) < len(names) + 2:
        raise ValueError(f"must have different names, none of them val or train, not {', '.join(names)}")


@attrs.frozen
class TextSet:
    """A set of texts other than the run's own data."""

    name: str = option(help="the metric is named <name>/bpb")
    path: Path = option(
        help="a .txt file (one document), a directory of them, a .jsonl or .parquet file with texts in `text`; "
        ".gz, .bz2, .xz and .zst are decompressed",
        validator=_exists,
    )


@attrs.frozen
class BpbConfig:
    """Options of ``bpb``."""

    eval_tokens: int = option(
        20 * 524288, "tokens to evaluate of each split and set; fewer where it has fewer", validator=at_least(1, 10**15)
    )
    split: Literal["val", "train", "both", "none"] = option(
        "val", "split of the run's data to evaluate; the metric is named <split>/bpb"
    )
    sets: tuple[TextSet, ...] = option(
        (), 'other texts to evaluate, as in sets = [{name = "code", path = "code.jsonl"}]', validator=_different_names
    )
