"""Spans: which tokens of a text are scored, so that the choices of a question compare."""

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
    """A text of which the tokens from ``start`` on are scored; those before are its context.

    Args:
        ids: all tokens, at least two.
        start: in [1, len(ids) - 1]: the first token has nothing before it, and there is something to score.
    """

    ids: Tokens = attrs.field(converter=_as_tokens)
    start: int

    def __attrs_post_init__(self) -> None:
        if not 1 <= self.start < len(self.ids):
            raise ValueError(f"a span of {len(self.ids)} tokens can't be scored from token {self.start} on")


def choice_spans(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    shared: Literal["prefix", "suffix"] = "prefix",
    max_len: int | None = None,
) -> list[Span]:
    """Spans that compare ``texts``, each led by bos.

    With a shared prefix (one question, several answers) scoring starts at the first token that differs; with a shared
    suffix (one ending, several beginnings) at the first token from which on all are the same. When that leaves nothing
    of a text, as when one answer is the beginning of another, scoring starts so much earlier that each text has a token
    to score. One text alone has nothing to differ from: its last token is scored.

    Args:
        max_len: of longer texts only the last ``max_len`` tokens are kept.
    """
    return token_spans(tokenizer.encode_documents(texts), shared, max_len)


def token_spans(
    rows: Sequence[Tokens], shared: Literal["prefix", "suffix"] = "prefix", max_len: int | None = None
) -> list[Span]:
    """``choice_spans`` of tokens."""
    shortest = min(map(len, rows))
    if shared == "prefix":
        starts = [min(common_prefix(rows), shortest - 1)] * len(rows)
    else:
        same = common_prefix([row[::-1] for row in rows])
        starts = [len(row) - max(min(same, shortest - 1), 1) for row in rows]
    return [cropped_span(row, start, max_len) for row, start in zip(rows, starts, strict=True)]


def cropped_span(ids: Tokens, start: int, max_len: int | None = None) -> Span:
    """The span, or its last ``max_len`` tokens; the first token kept is never scored."""
    cut = max(0, len(ids) - max_len) if max_len is not None else 0
    return Span(ids[cut:], max(start - cut, 1))


def common_prefix(rows: Sequence[Tokens]) -> int:
    """How many tokens all ``rows`` begin with."""
    shortest = min(map(len, rows))
    first = rows[0][:shortest]
    same = np.ones(shortest, dtype=bool)
    for row in rows[1:]:
        same &= first == row[:shortest]
    return shortest if same.all() else int(same.argmin())
