"""Options of the tokenizer ``sentencepiece``."""

from pathlib import Path
from typing import Literal

import attrs

from nanochat_core import SPECIAL_TOKENS, at_least, between, option, regular_file

LEAST = 1 + 256 + len(SPECIAL_TOKENS)  # <unk>, the bytes, special tokens


@attrs.frozen
class SentencePieceConfig:
    """Options of ``sentencepiece``. Text is not normalized; parts that no piece covers are spelled in bytes."""

    vocab_size: int | None = option(
        None,
        "number of tokens: <unk>, 256 bytes, the pieces, nine special ones; default 32768, or that of model_file",
        validator=at_least(LEAST + 1, 2**24),
    )
    model_file: Path | None = option(
        None,
        "a .model file to use instead of training; it must not change text and must have byte pieces",
        on_resume="free",
        validator=regular_file("a .model file"),
    )
    model_type: Literal["bpe", "unigram"] = option("bpe", "algorithm that learns the pieces")
    character_coverage: float = option(
        0.9995, "share of the text's characters that get their own piece", validator=between(0.9, 1)
    )
    max_chars: int = option(
        200_000_000, "number of characters of training documents to learn from", validator=at_least(1, 10**15)
    )
    doc_cap: int = option(
        10_000,
        "number of characters of each document to learn from; the rest is ignored",
        validator=at_least(1, 10**15),
    )

    def __attrs_post_init__(self) -> None:
        if self.model_file is None and self.vocab_size is None:
            object.__setattr__(self, "vocab_size", 32768)
