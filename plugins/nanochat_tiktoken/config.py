"""Options of the tokenizer ``tiktoken``."""

from pathlib import Path

import attrs

from nanochat_core import option, regular_file


@attrs.frozen
class TiktokenConfig:
    """Options of ``tiktoken``, a published encoding and nine special tokens. Nothing is trained or downloaded."""

    encoding: str | None = option(
        None, "name of an encoding of tiktoken, such as gpt2 or cl100k_base, read from tiktoken's cache"
    )
    path: Path | None = option(
        None,
        "a file of merges to use instead of encoding: lines of base64 bytes and rank, the format of tiktoken",
        validator=regular_file("a .tiktoken file"),
        on_resume="free",
    )
    pattern: str | None = option(
        None, "regular expression whose matches are the words; merges don't cross their ends; required with path"
    )

    def __attrs_post_init__(self) -> None:
        if (self.encoding is None) == (self.path is None):
            raise ValueError("set either encoding or path")
        if (self.path is None) != (self.pattern is None):
            raise ValueError("path and pattern belong together: set both or neither")
