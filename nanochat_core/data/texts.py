"""Text handling that tokenizers share. Imports no torch, so that config modules may import it."""

from __future__ import annotations

import re
from itertools import pairwise

# Special tokens that chat and tool use need; the first one leads every document.
SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)

LONGEST_RUN = 100_000
_LONG_RUN = re.compile(rf"\s{{{LONGEST_RUN}}}")


def well_formed(text: str) -> str:
    """``text`` as UTF-8 can hold it: surrogate pairs joined, lone halves replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def cut_long_runs(text: str) -> list[str]:
    """``text``, cut inside white space of more than ``LONGEST_RUN`` characters: regular expressions that backtrack
    overflow their stack in it (somewhere above 700,000)."""
    if len(text) <= LONGEST_RUN:
        return [text]
    cuts = [0, *(match.end() for match in _LONG_RUN.finditer(text)), len(text)]
    return [text[start:stop] for start, stop in pairwise(cuts) if start < stop]
