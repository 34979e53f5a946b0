"""Which spans are scored together: unique spans, sorted by length, packed into batches, dealt to ranks.

All of it depends on what the spans are, never on where they stand or how many ranks there are, so that scores are the
same to the last bit for any order of the questions and any number of ranks. ``scoring.py`` computes the batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from nanochat_core.evaluation.spans import Span, common_prefix


def _key(span: Span) -> tuple[int, bytes]:
    return span.start, span.ids.tobytes()


def unique_questions(questions: Sequence[Sequence[Span]]) -> tuple[list[list[Span]], list[tuple[int, list[int]]]]:
    """Questions and spans without repetitions.

    Returns:
        The different questions, each with its different spans, sorted; and for each question as it was asked the index
        of the one that it equals, and of each of its choices the index among that question's spans.
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
    """Spans that are computed together.

    Args:
        names: (question, choice) of each span; the shortest span comes first.
        shared: tokens that all of them read first.
    """

    spans: tuple[Span, ...]
    names: tuple[tuple[int, int], ...]
    shared: int

    @property
    def reads(self) -> list[int]:
        """Positions each span reads: its last token is only predicted."""
        return [len(span.ids) - 1 for span in self.spans]


def group_spans(questions: list[list[Span]], share: int | None) -> list[SpanGroup]:
    """Groups of each question's spans, ordered by nothing but what they are: few spans first, long ones first.

    Args:
        share: a question's spans make one group where computing what they begin with once saves at least so many
            positions, else each has a group of its own; None: each has.
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
    """Groups with equally many spans, computed by passes over [groups, positions].

    Args:
        prefix: positions that are read in the first pass; all of a group's spans share them.
        rests: positions of the passes that follow, one for each span of a group.
    """

    groups: tuple[SpanGroup, ...]
    prefix: int
    rests: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Positions that are computed, with padding."""
        return len(self.groups) * (self.prefix + sum(self.rests))


def _batch(groups: Sequence[SpanGroup]) -> SpanBatch:
    if len(groups[0].spans) == 1:
        return SpanBatch(tuple(groups), max(g.shared for g in groups), ())
    prefix = min(g.shared for g in groups)
    rests = tuple(max(g.reads[i] for g in groups) - prefix for i in range(len(groups[0].spans)))
    return SpanBatch(tuple(groups), prefix, rests)


def plan_batches(groups: list[SpanGroup], batch_tokens: int) -> list[SpanBatch]:
    """Neighbours go together until the budget is full, or a quarter of the work would be padding (a batch of its own
    costs something too: a little padding is always cheaper).

    Small sets of questions are cut finer, so that there is something to deal to every rank.
    """
    batches: list[SpanBatch] = []
    useful = [g.shared + sum(n - g.shared for n in g.reads) for g in groups]
    budget = min(batch_tokens, max(batch_tokens // 4, sum(useful) // 16))
    first = 0
    needed = prefix = longest = 0
    for index, group in enumerate(groups):
        # Of the open batch, which begins at ``first``; kept up to date, not computed anew for each group.
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
    """Each rank's batches: the largest batch first, each to the rank that has the fewest positions to compute."""
    by_rank: list[list[SpanBatch]] = [[] for _ in range(size)]
    loads = [0] * size
    for batch in sorted(batches, key=lambda b: -b.tokens):
        rank = loads.index(min(loads))
        by_rank[rank].append(batch)
        loads[rank] += batch.tokens
    return by_rank
