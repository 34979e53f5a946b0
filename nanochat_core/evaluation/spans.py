"""Spans: the tokens of a text that are scored, chosen so that the choices of a question are comparable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import attrs
import numpy as np
import numpy.typing as npt

from nanochat_core.interfaces.tokenizer import Tokenizer
from nanochat_core.interfaces.types import Tokens


def _as_tokens(ids: npt.ArrayLike) -> Tokens:
    return np.asarray(ids, dtype=np.int32)


@attrs.frozen(eq=False)
class Span:
    """A text whose tokens from ``start`` on are scored; those before it are the context.

    Args:
        ids: all tokens, at least two.
        start: index of the first scored token, in [1, len(ids) - 1].

    Raises:
        ValueError: when ``start`` is out of range.
    """

    ids: Tokens = attrs.field(converter=_as_tokens)
    start: int

    def __attrs_post_init__(self) -> None:
        if not 1 <= self.start < len(self.ids):
            raise ValueError(
                f"a span of {len(self.ids)} tokens can't be scored from index {self.start}: one token must precede it"
            )


def choice_spans(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    shared: Literal["prefix", "suffix"] = "prefix",
    max_len: int | None = None,
) -> list[Span]:
    """Return spans with which ``texts`` can be compared. Each begins with bos.

    With a shared prefix (one question, several answers) scoring starts at the first token that differs; with a shared
    suffix (one ending, several beginnings) at the first token of the common suffix. If a text would then have no scored
    token, as when one answer is the beginning of another, scoring starts early enough that each text has one. Of a
    single text the last token is scored.

    Args:
        texts: the choices.
        shared: the part that the texts have in common.
        max_len: maximum number of tokens of a span; of longer texts the last ``max_len`` are kept.
    """
    return token_spans(tokenizer.encode_documents(texts), shared, max_len)


def token_spans(
    rows: Sequence[Tokens], shared: Literal["prefix", "suffix"] = "prefix", max_len: int | None = None
) -> list[Span]:
    """Return the spans of ``choice_spans`` for texts that are tokenized already, each row one text."""
    shortest = min(map(len, rows))
    if shared == "prefix":
        starts = [min(common_prefix(rows), shortest - 1)] * len(rows)
    else:
        same = common_prefix([row[::-1] for row in rows])
        starts = [len(row) - max(min(same, shortest - 1), 1) for row in rows]
    return [cropped_span(row, start, max_len) for row, start in zip(rows, starts, strict=True)]


def cropped_span(ids: Tokens, start: int, max_len: int | None = None) -> Span:
    """Return a span of the last ``max_len`` of ``ids`` (None: of all); its first token is never scored."""
    cut = max(0, len(ids) - max_len) if max_len is not None else 0
    return Span(ids[cut:], max(start - cut, 1))


def common_prefix(rows: Sequence[Tokens]) -> int:
    """Return the number of tokens with which all ``rows`` begin in common."""
    shortest = min(map(len, rows))
    first = rows[0][:shortest]
    same = np.ones(shortest, dtype=bool)
    for row in rows[1:]:
        same &= first == row[:shortest]
    return shortest if same.all() else int(same.argmin())
