"""Batches of spans to score: unique spans, sorted by length, packed into batches, distributed over ranks.

The batches depend only on the content of the spans, not on their order or the number of ranks. So scores are the same
to the last bit for any order of the questions and any number of ranks. ``scoring.py`` computes the batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from nanochat_core.evaluation.spans import Span, common_prefix


def _key(span: Span) -> tuple[int, bytes]:
    return span.start, span.ids.tobytes()


def unique_questions(questions: Sequence[Sequence[Span]]) -> tuple[list[list[Span]], list[tuple[int, list[int]]]]:
    """Remove repeated questions and repeated spans of a question.

    Returns:
        The distinct questions, each with its distinct spans, sorted; and for each given question the index of its
        distinct question, with the index of each of its choices among the spans of that question.
    """
    unique: list[list[Span]] = []
    index: dict[tuple[tuple[int, bytes], ...], int] = {}
    members = []
    for question in questions:
        keys = [_key(span) for span in question]
        spans = dict(zip(keys, question, strict=True))
        ordered = tuple(sorted(spans))
        if ordered not in index:
            index[ordered] = len(unique)
            unique.append([spans[key] for key in ordered])
        place = {key: i for i, key in enumerate(ordered)}
        members.append((index[ordered], [place[key] for key in keys]))
    return unique, members


@attrs.frozen(eq=False)
class SpanGroup:
    """Spans of one question that are computed together.

    Args:
        spans: the spans, the shortest first.
        names: (question, choice) of each span.
        shared: number of tokens at the beginning that all spans have in common.
    """

    spans: tuple[Span, ...]
    names: tuple[tuple[int, int], ...]
    shared: int

    @property
    def reads(self) -> list[int]:
        """Number of positions that each span reads: all but its last token, which is only predicted."""
        return [len(span.ids) - 1 for span in self.spans]


def group_spans(questions: list[list[Span]], share: int | None) -> list[SpanGroup]:
    """Group the spans of each question, and sort the groups by their content: few spans first, long ones first.

    Args:
        share: the spans of a question form one group if computing their common beginning once saves at least this
            many positions, otherwise a group each; None: always a group each.
    """
    groups = []
    for question, spans in enumerate(questions):
        order = sorted(range(len(spans)), key=lambda i, s=spans: len(s[i].ids))  # type: ignore[misc]
        whole = SpanGroup(
            tuple(spans[i] for i in order),
            tuple((question, i) for i in order),
            common_prefix([span.ids[:-1] for span in spans]),
        )
        saved = (len(spans) - 1) * whole.shared
        if share is not None and whole.shared > 1 and saved >= max(1, share):
            groups.append(whole)
        else:
            groups += [SpanGroup((span,), ((question, i),), len(span.ids) - 1) for i, span in enumerate(spans)]
    return sorted(groups, key=lambda g: (len(g.spans), -g.shared, [-n for n in g.reads], [_key(s) for s in g.spans]))


@attrs.frozen(eq=False)
class SpanBatch:
    """Groups with the same number of spans, computed by forward passes over [groups, positions].

    Args:
        groups: the groups.
        prefix: number of positions of the first pass, which all spans of a group share.
        rests: number of positions of each of the following passes, one per span of a group; empty for single spans.
    """

    groups: tuple[SpanGroup, ...]
    prefix: int
    rests: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Number of positions that are computed, including padding."""
        return len(self.groups) * (self.prefix + sum(self.rests))


def _batch(groups: Sequence[SpanGroup]) -> SpanBatch:
    if len(groups[0].spans) == 1:
        return SpanBatch(tuple(groups), max(g.shared for g in groups), ())
    prefix = min(g.shared for g in groups)
    rests = tuple(max(g.reads[i] for g in groups) - prefix for i in range(len(groups[0].spans)))
    return SpanBatch(tuple(groups), prefix, rests)


def plan_batches(groups: list[SpanGroup], batch_tokens: int) -> list[SpanBatch]:
    """Combine neighbouring groups into batches until the budget is full or a quarter of the work would be padding.

    A little padding is always accepted, since another batch costs time too. Small sets of questions are divided into
    smaller batches, so that every rank gets some.

    Args:
        groups: groups in the order of ``group_spans``.
        batch_tokens: maximum number of positions of a batch; a larger single group is a batch of its own.
    """
    batches: list[SpanBatch] = []
    useful = [g.shared + sum(n - g.shared for n in g.reads) for g in groups]
    budget = min(batch_tokens, max(batch_tokens // 4, sum(useful) // 16))
    first = 0
    needed = prefix = longest = 0
    for index, group in enumerate(groups):
        # These are of the open batch, which begins at ``first``, and are updated with each group instead of recomputed.
        if index == first:
            prefix, longest, reads, needed = group.shared, group.shared, list(group.reads), useful[index]
            continue
        new_prefix, new_longest = min(prefix, group.shared), max(longest, group.shared)
        fits = len(group.spans) == len(groups[first].spans)
        if fits:
            new_reads = list(map(max, reads, group.reads))
            each = new_longest if len(group.spans) == 1 else new_prefix + sum(n - new_prefix for n in new_reads)
            tokens = (index - first + 1) * each
            padding = tokens - needed - useful[index]
            fits = tokens <= budget and padding <= max(tokens // 4, batch_tokens // 32)
        if fits:
            prefix, longest, reads, needed = new_prefix, new_longest, new_reads, needed + useful[index]
        else:
            batches.append(_batch(groups[first:index]))
            first = index
            prefix, longest, reads, needed = group.shared, group.shared, list(group.reads), useful[index]
    if groups:
        batches.append(_batch(groups[first:]))
    return batches


def deal_batches(batches: list[SpanBatch], size: int) -> list[list[SpanBatch]]:
    """Distribute batches over ``size`` ranks: largest first, each to the rank with the fewest positions to compute."""
    by_rank: list[list[SpanBatch]] = [[] for _ in range(size)]
    loads = [0] * size
    for batch in sorted(batches, key=lambda b: -b.tokens):
        rank = loads.index(min(loads))
        by_rank[rank].append(batch)
        loads[rank] += batch.tokens
    return by_rank
