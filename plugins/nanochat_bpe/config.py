"""Options of the tokenizer ``bpe``."""

from typing import Literal

import attrs

from nanochat_core import SPECIAL_TOKENS, at_least, option

BYTES = 256

# GPT-4's split pattern, but numbers in groups of at most two digits: small vocabularies have no room for 000 to 999.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)


@attrs.frozen
class BPEConfig:
    """Options of ``bpe``, a byte-level BPE of exactly ``vocab_size`` tokens."""

    vocab_size: int = option(
        32768,
        "number of tokens: 256 bytes, the merges, and nine special ones",
        validator=at_least(BYTES + len(SPECIAL_TOKENS), 2**24),
    )
    max_chars: int = option(
        2_000_000_000, "number of characters of training documents to learn from", validator=at_least(1, 10**15)
    )
    doc_cap: int = option(
        10_000,
        "number of characters of each document to learn from; the rest is ignored",
        validator=at_least(1, 10**15),
    )
    pattern: str = option(PATTERN, "regular expression whose matches are the words; merges don't cross their ends")
    encoder: Literal["tiktoken", "gigatoken"] = option(
        "tiktoken",
        "library that encodes: gigatoken (an optional library) gives the same tokens several times as fast, for the "
        "default pattern and for GPT-4's",
        on_resume="free",
    )
