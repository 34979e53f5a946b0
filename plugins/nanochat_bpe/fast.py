"""Encoding with gigatoken: the tokens of tiktoken, several times as fast.

gigatoken knows GPT-4's split pattern but not groups of two digits. In that pattern a digit never shares a word with
what is not a digit, so text that is cut after every second digit of a number gives just these groups. The two libraries
have different Unicode tables: text with a character that the library ``regex`` does not know goes to tiktoken.
"""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import regex  # a dependency of tiktoken

from nanochat_bpe.config import PATTERN
from nanochat_core import ConfigError, Tokens

GPT4_PATTERN = PATTERN.replace("{1,2}", "{1,3}")
_SPECIAL_CARE = regex.compile(r"\p{N}{3}|\p{Cn}|\p{Cs}")
_UNKNOWN = regex.compile(r"\p{Cn}|\p{Cs}")
_CUT = regex.compile(r"\p{N}{2}(?=\p{N})")


def make_encoder(pattern: str, tokens: Sequence[bytes], slow: Callable[[str], Tokens]) -> Callable[[str], Tokens]:
    """Return a function from text to int32 tokens, which gives the tokens of ``slow``.

    Args:
        pattern: the split pattern.
        tokens: bytes of the ordinary tokens by id.
        slow: encodes with tiktoken; used for text with unknown characters.

    Raises:
        ConfigError: when gigatoken isn't installed, or doesn't support the pattern.
    """
    if pattern not in (PATTERN, GPT4_PATTERN):
        raise ConfigError('gigatoken does not support tokenizer.pattern; set it to "tiktoken"', key="encoder")
    try:
        import gigatoken
    except ImportError as error:
        raise ConfigError(
            f"gigatoken can't be imported ({error}): pip install gigatoken, or set it to "
            f'"tiktoken", which gives the same tokens',
            key="encoder",
        ) from error
    with tempfile.TemporaryDirectory() as directory:  # gigatoken reads merges from files only
        file = Path(directory) / "merges.tiktoken"
        lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
        file.write_text("".join(lines), encoding="ascii", newline="\n")
        fast = gigatoken.Tokenizer.from_tiktoken(str(file), pretokenizer="gpt4")
    cut_numbers = pattern == PATTERN

    def encode(text: str) -> Tokens:
        if _SPECIAL_CARE.search(text) is not None:
            if _UNKNOWN.search(text) is not None:
                return slow(text)
            if cut_numbers:
                cuts = [0, *(match.end() for match in _CUT.finditer(text)), len(text)]
                return np.concatenate([fast.encode(text[start:stop]) for start, stop in pairwise(cuts)]).view(np.int32)
        ids: Tokens = fast.encode(text).view(np.int32)
        return ids

    return encode
