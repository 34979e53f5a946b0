"""Scoring: how likely a model finds given continuations, for many questions at once.

Spans are made unique, sorted by length and packed into batches by what they are, never by where they stand or how many
ranks there are; then the batches are dealt to ranks. So scores are the same to the last bit for any order of the
questions and any number of ranks. What all choices of a question begin with is computed once, where the model's cache
can be set back. Logits exist only for positions that are scored.

E questions of a batch, C choices a question, T positions, D hidden size, V vocabulary, N = any number of positions.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from nanochat_core.errors import NanochatError
from nanochat_core.evaluation.spans import Span, common_prefix
from nanochat_core.interfaces.evaluator import EvaluatorContext
from nanochat_core.interfaces.model import Model
from nanochat_core.interfaces.types import Tokens

CLOSE = 1e-4  # scores of other batch sizes agree within this; what it decides is called close
BATCH_TOKENS_CPU = 4096
BATCH_TOKENS = 32768
LOGITS_CPU = 2**23 - 2**16  # logits made at once: below 32 MiB, where malloc uses memory again
LOGITS = 2**27
WORTH_SHARING = 256  # positions; on a CPU with depth 4 the passes that sharing adds cost more than fewer save
CACHED_CPU = 2**17  # logits that a core's cache holds

Counts = npt.NDArray[np.int64]


class OutOfTime(NanochatError):
    """An evaluation's ``time_budget`` ended before everything was scored."""


@attrs.frozen
class SpanScore:
    """What a model thinks of a span.

    Args:
        nats: sum of the negative log-probabilities of its tokens; NaN when time ran out before.
        tokens: how many there are.
        greedy: each of them is the likeliest one after those before it (of equally likely ones the lowest).
        margin: how much the logit of the least convincing token lies above all others (below, if negative).
    """

    nats: float
    tokens: int
    greedy: bool
    margin: float

    @property
    def mean(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens


def score_choices(
    model: Model, questions: Sequence[Sequence[Span]], context: EvaluatorContext | None = None, **options: Any
) -> list[list[float]]:
    """Mean nats a token of each choice of each question: the lowest is what the model prefers (see ``pick_choice``).

    See ``score_spans`` for the arguments.
    """
    return [[score.mean for score in scores] for scores in score_spans(model, questions, context, **options)]


def greedy_match(
    model: Model, spans: Sequence[Span], context: EvaluatorContext | None = None, **options: Any
) -> list[bool]:
    """Whether greedy sampling would continue each span's context with exactly its scored tokens."""
    scores = score_spans(model, [[span] for span in spans], context, greedy=True, **options)
    return [score.greedy for (score,) in scores]


def pick_choice(scores: Sequence[float]) -> int:
    """Index of the lowest score; of equal ones the first."""
    return min(range(len(scores)), key=scores.__getitem__)


def is_close_call(scores: Sequence[float]) -> bool:
    """Whether the lowest two different scores differ by less than ``CLOSE``: another batch size might decide
    otherwise. Exact ties are none: they come from identical choices, and always go to the first."""
    different = sorted(set(scores))
    return len(different) > 1 and different[1] - different[0] < CLOSE


def score_spans(
    model: Model,
    questions: Sequence[Sequence[Span]],
    context: EvaluatorContext | None = None,
    *,
    greedy: bool = False,
    batch_tokens: int | None = None,
    share: int | None = WORTH_SHARING,
    partial: bool = False,
    title: str = "",
    work: dict[str, int] | None = None,
) -> list[list[SpanScore]]:
    """Score every span of every question. Collective: each rank asks the same, does its share, and gets everything.

    Args:
        model: in eval mode.
        questions: spans that belong together, such as the choices of one question: what they begin with is shared.
        context: the evaluator's, which knows ranks and time budget; without it this process works alone.
        greedy: also find out ``greedy`` and ``margin``, which takes a little longer (else False and NaN).
        batch_tokens: positions a forward pass reads at most (more only for a single question that is larger).
        share: what a question's spans begin with is computed once where that saves at least so many positions; None:
            never.
        partial: when time runs out, give what there is, the rest with NaN nats, instead of raising.
        title: of the progress bar.
        work: gets ``tokens``, positions that were computed, and ``head``, positions that got logits, added.

    Raises:
        OutOfTime: when the time budget ended first (on all ranks).
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    world = context.world if context is not None else None
    rank, size = (world.rank, world.size) if world is not None else (0, 1)
    deadline = time.monotonic() + context.time_left() if context is not None else math.inf
    unique, members = _unique(questions)
    with torch.no_grad():
        if share is not None and not (any(len(q) > 1 for q in unique) and _cache_goes_back(model, device)):
            share = None
        groups = _groups(unique, share)
        batches = _plan(groups, batch_tokens or (BATCH_TOKENS_CPU if device.type == "cpu" else BATCH_TOKENS))
        mine = _deal(batches, size)[rank]
        offsets = np.cumsum([0, *(len(q) for q in unique)])
        found = np.zeros((int(offsets[-1]), 4))  # nats, greedy, margin, done
        if mine and math.isfinite(deadline) and time.monotonic() > deadline:
            mine = []
        visible = rank == 0 and bool(title) and sys.stderr.isatty()
        total = sum(batch.tokens for batch in mine)
        with tqdm(total=total, desc=title, unit="tok", unit_scale=True, leave=False, disable=not visible) as bar:
            for batch in mine:
                if time.monotonic() > deadline:
                    break
                for (question, choice), row in _score_batch(model, batch, device, greedy, work):
                    found[offsets[question] + choice] = row
                bar.update(batch.tokens)
    if world is not None and size > 1:
        found = np.array(world.sum(found.ravel().tolist())).reshape(found.shape)
    if not partial and not found[:, 3].all():
        done, everything = int(found[:, 3].sum()), len(found)
        raise OutOfTime(f"time_budget: {done} of {everything} texts were scored in time: give more seconds")
    scores = []
    for question, choices in enumerate(members):
        rows = [found[offsets[choices[0]] + choice] for choice in choices[1]]
        spans = questions[question]
        scores.append([_score(span, row) for span, row in zip(spans, rows, strict=True)])
    return scores


def _score(span: Span, row: npt.NDArray[np.float64]) -> SpanScore:
    nats, greedy, margin, done = row.tolist()
    return SpanScore(nats if done else math.nan, len(span.ids) - span.start, bool(greedy), margin if done else math.nan)


# -------------------------------------------------------------------------------------------------------- planning


def _key(span: Span) -> tuple[int, bytes]:
    return span.start, span.ids.tobytes()


def _unique(questions: Sequence[Sequence[Span]]) -> tuple[list[list[Span]], list[tuple[int, list[int]]]]:
    """Different questions, each with different spans in an order of their own; and for each question as it was asked
    which one it is, and which of its spans each choice is."""
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
class _Group:
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


def _groups(questions: list[list[Span]], share: int | None) -> list[_Group]:
    """In an order that only depends on what they are: few spans first, long ones first."""
    groups = []
    for question, spans in enumerate(questions):
        order = sorted(range(len(spans)), key=lambda i, s=spans: len(s[i].ids))  # type: ignore[misc]
        whole = _Group(
            tuple(spans[i] for i in order),
            tuple((question, i) for i in order),
            common_prefix([span.ids[:-1] for span in spans]),
        )
        saved = (len(spans) - 1) * whole.shared
        if share is not None and whole.shared > 1 and saved >= max(1, share):
            groups.append(whole)
        else:
            groups += [_Group((span,), ((question, i),), len(span.ids) - 1) for i, span in enumerate(spans)]
    return sorted(groups, key=lambda g: (len(g.spans), -g.shared, [-n for n in g.reads], [_key(s) for s in g.spans]))


@attrs.frozen(eq=False)
class _Batch:
    """Groups with equally many spans.

    Args:
        prefix: positions that are read in the first pass; all of a group's spans share them.
        rests: positions of the passes that follow, one for each span of a group.
    """

    groups: tuple[_Group, ...]
    prefix: int
    rests: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return len(self.groups) * (self.prefix + sum(self.rests))


def _batch(groups: Sequence[_Group]) -> _Batch:
    if len(groups[0].spans) == 1:
        return _Batch(tuple(groups), max(g.shared for g in groups), ())
    prefix = min(g.shared for g in groups)
    rests = tuple(max(g.reads[i] for g in groups) - prefix for i in range(len(groups[0].spans)))
    return _Batch(tuple(groups), prefix, rests)


def _plan(groups: list[_Group], batch_tokens: int) -> list[_Batch]:
    """Neighbours go together until the budget is full, or a quarter of the work would be padding (a batch of its own
    costs something too: a little padding is always cheaper).

    Small sets of questions are cut finer, so that there is something to deal to every rank.
    """
    batches: list[_Batch] = []
    useful = [g.shared + sum(n - g.shared for n in g.reads) for g in groups]
    budget = min(batch_tokens, max(batch_tokens // 4, sum(useful) // 16))
    first = 0
    needed = prefix = longest = 0
    rests: list[int] = []
    for index, group in enumerate(groups):
        # What the batch would become, kept up to date instead of made anew.
        if index == first:
            prefix, longest, reads, needed = group.shared, group.shared, list(group.reads), useful[index]
            continue
        new_prefix, new_longest = min(prefix, group.shared), max(longest, group.shared)
        fits = len(group.spans) == len(groups[first].spans)
        if fits:
            new_reads = list(map(max, reads, group.reads))
            rests = [n - new_prefix for n in new_reads]
            each = new_longest if len(group.spans) == 1 else new_prefix + sum(rests)
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


def _deal(batches: list[_Batch], size: int) -> list[list[_Batch]]:
    """The largest batch first, each to the rank that has least to do."""
    hands: list[list[_Batch]] = [[] for _ in range(size)]
    loads = [0] * size
    for batch in sorted(batches, key=lambda b: -b.tokens):
        rank = loads.index(min(loads))
        hands[rank].append(batch)
        loads[rank] += batch.tokens
    return hands


# ------------------------------------------------------------------------------------------------------- computing


def _cache_goes_back(model: Model, device: torch.device) -> bool:
    """Whether positions of the model's cache can be forgotten by setting ``length``. Tried, not believed: a model with
    a recurrent state could let itself be set without forgetting."""
    cache, fresh = model.new_cache(1, 4), model.new_cache(1, 4)
    if cache is None or fresh is None:
        return False
    ids_BT = torch.tensor([[0, 1, 2, 3]], device=device) % model.vocab_size
    model.hidden(ids_BT[:, :3], cache)
    try:
        cache.length = 1  # type: ignore[misc]
    except AttributeError:
        return False
    again = model.hidden(ids_BT[:, 2:], cache)
    model.hidden(ids_BT[:, :1], fresh)
    return bool(torch.allclose(again, model.hidden(ids_BT[:, 2:], fresh), rtol=1e-4, atol=1e-4))


def _score_batch(
    model: Model, batch: _Batch, device: torch.device, greedy: bool, work: dict[str, int] | None
) -> list[tuple[tuple[int, int], tuple[float, float, float, float]]]:
    """(nats, greedy, margin, done) of each span of the batch, with its name."""
    E, P = len(batch.groups), batch.prefix
    widths = [P, *batch.rests]  # positions of each pass
    bases = np.cumsum([0, *(E * width for width in widths)])  # number of a pass's first position
    # Each scored token: the number of the position that predicts it, the token, the span it belongs to.
    positions, targets, owners = [], [], []
    names: list[tuple[int, int]] = []
    for e, group in enumerate(batch.groups):
        for c, span in enumerate(group.spans):
            at = np.arange(span.start - 1, len(span.ids) - 1)
            number = bases[0] + e * P + at
            if batch.rests:
                late = bases[1 + c] + e * batch.rests[c] + (at - P)
                number = np.where(at < P, number, late)
            positions.append(number)
            targets.append(span.ids[span.start :])
            owners.append(np.full(len(at), len(names)))
            names.append(group.names[c])
    wanted, rows = np.unique(np.concatenate(positions), return_inverse=True)
    states_ND = _states(model, batch, wanted, bases, widths, device)
    found = _judge(model, states_ND, rows, np.concatenate(targets), greedy)
    owner = np.concatenate(owners)
    nats = np.bincount(owner, weights=found[0], minlength=len(names))
    first = np.flatnonzero(np.diff(owner, prepend=-1))
    every = np.minimum.reduceat(found[1], first)
    margin = np.minimum.reduceat(found[2], first)
    if work is not None:
        work["tokens"] = work.get("tokens", 0) + batch.tokens
        work["head"] = work.get("head", 0) + len(wanted)
    return [(name, (nats[i], every[i], margin[i], 1.0)) for i, name in enumerate(names)]


def _states(
    model: Model, batch: _Batch, wanted: Counts, bases: Counts, widths: list[int], device: torch.device
) -> Tensor:
    """[N, D] hidden states of the positions that are wanted."""
    cache: Any = None
    if batch.rests:
        cache = model.new_cache(len(batch.groups), batch.prefix + max(batch.rests))
    kept = []
    for number, width in enumerate(widths):
        if width == 0:
            continue
        ids_ET = np.zeros((len(batch.groups), width), dtype=np.int64)
        for row, group in zip(ids_ET, batch.groups, strict=True):
            start = 0 if number == 0 else batch.prefix
            # Padding comes last, where causal attention doesn't see it.
            ids = group.spans[max(number - 1, 0)].ids[start : min(start + width, group.reads[max(number - 1, 0)])]
            row[: len(ids)] = ids
        if number > 1:
            cache.length = batch.prefix
        states_ETD = model.hidden(torch.from_numpy(ids_ET).to(device), cache)
        here = wanted[(wanted >= bases[number]) & (wanted < bases[number + 1])] - bases[number]
        kept.append(states_ETD.flatten(0, 1).index_select(0, torch.from_numpy(here).to(device)))
    return torch.cat(kept)


def _judge(
    model: Model, states_ND: Tensor, rows: Counts, targets: Tokens, greedy: bool
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """For each (row of states, target): nats, whether it is the likeliest token, margin of its logit."""
    elements = LOGITS_CPU if states_ND.is_cpu else LOGITS
    chunk = max(16, elements // model.vocab_size)
    few = max(4, CACHED_CPU * torch.get_num_threads() // model.vocab_size) if states_ND.is_cpu else chunk
    order = np.argsort(rows, kind="stable")
    bounds = np.searchsorted(rows[order], range(0, len(states_ND) + chunk, chunk))
    nats, best, margins = np.zeros(len(rows)), np.zeros(len(rows)), np.full(len(rows), math.nan)
    for index, states in enumerate(states_ND.split(chunk)):
        z_NV = model.logits(states)
        pairs = order[bounds[index] : bounds[index + 1]]
        row_M = torch.from_numpy(rows[pairs] - index * chunk).to(z_NV.device)
        target_M = torch.from_numpy(targets[pairs].astype(np.int64)).to(z_NV.device)
        if greedy:
            target_z_M = z_NV[row_M, target_M]
            top_N2, ids_N2 = z_NV.topk(2)
            first_N = ids_N2[:, 0]
            if bool((top_N2[:, 0] == top_N2[:, 1]).any()):
                first_N = z_NV.argmax(-1)  # the lowest of equal ones, which topk does not promise
            hit_M = first_N[row_M] == target_M
            other_M = torch.where(ids_N2[:, 0][row_M] == target_M, top_N2[:, 1][row_M], top_N2[:, 0][row_M])
            best[pairs] = hit_M.cpu().numpy()
            margins[pairs] = (target_z_M - other_M).double().cpu().numpy()
        # A few rows at a time, which stay in the processor's cache between the passes over them.
        total_N = torch.cat([z.logsumexp(-1) for z in z_NV.split(few)])
        nats[pairs] = (total_N[row_M] - z_NV[row_M, target_M]).double().cpu().numpy()
    return nats, best, margins
