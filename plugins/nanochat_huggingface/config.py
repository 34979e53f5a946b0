"""Options of the tokenizer ``huggingface``."""

from pathlib import Path
from typing import Any

import attrs

from nanochat_core import option


def _is_file(_: Any, attribute: Any, value: Path) -> None:
    if not value.is_file():
        raise ValueError(f"{value} is not a file: set it to a tokenizer.json")


@attrs.frozen
class HuggingFaceConfig:
    """Options of ``huggingface``, a byte-level tokenizer.json. Text is never normalized, even if the file says so."""

    path: Path = option(help="path of a tokenizer.json", validator=_is_file, on_resume="free")
