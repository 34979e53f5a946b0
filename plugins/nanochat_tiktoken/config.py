"""Options of the tokenizer ``tiktoken``."""

from pathlib import Path
from typing import Any

import attrs

from nanochat_core import option


def _is_file(_: Any, attribute: Any, value: Path | None) -> None:
    if value is not None and not value.is_file():
        raise ValueError(f"{value} is no file: give the path of a .tiktoken file")


@attrs.frozen
class TiktokenConfig:
    """A published encoding, with nine special tokens after its own. Nothing is trained, and nothing is downloaded."""

    encoding: str | None = option(
        None, "name of an encoding that tiktoken knows, such as gpt2 or cl100k_base, read from tiktoken's cache"
    )
    path: Path | None = option(
        None, "a file of merges instead: lines of base64 bytes and rank, as tiktoken publishes them",
        validator=_is_file, on_resume="free",
    )  # fmt: skip
    pattern: str | None = option(None, "regular expression of the words that merges never cross; needed with path")

    def __attrs_post_init__(self) -> None:
        if (self.encoding is None) == (self.path is None):
            raise ValueError("give encoding or path, one of them")
        if (self.path is None) != (self.pattern is None):
            raise ValueError("path and pattern belong together: give both or none")
