"""Options of the tokenizer ``huggingface``."""

from pathlib import Path

import attrs

from nanochat_core import option, regular_file


@attrs.frozen
class HuggingFaceConfig:
    """Options of ``huggingface``, a byte-level tokenizer.json. Text is never normalized, even if the file says so."""

    path: Path = option(help="path of a tokenizer.json", validator=regular_file("a tokenizer.json"), on_resume="free")
