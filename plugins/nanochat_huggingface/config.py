"""Options of the tokenizer ``huggingface``."""

from pathlib import Path
from typing import Any

import attrs

from nanochat_core import option


def _is_file(_: Any, attribute: Any, value: Path) -> None:
    if not value.is_file():
        raise ValueError(f"{value} is no file: give the path of a tokenizer.json")


@attrs.frozen
class HuggingFaceConfig:
    """A byte-level tokenizer.json; text is never normalised, whatever the file says."""

    path: Path = option(help="a tokenizer.json", validator=_is_file, on_resume="free")
