"""Scoring: how likely a model finds given continuations, for many questions at once.

``score_batches.py`` plans which spans are computed together; here they are computed. What all choices of a question
begin with is computed once, where the model's cache can be set back. Logits exist only for positions that are scored.

E groups of a batch, T positions, D hidden size, V vocabulary, N scored positions, M scored tokens (several of them may
be predicted at one position, by choices that begin alike).
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
from nanochat_core.evaluation.score_batches import (
    SpanBatch,
    deal_batches,
    group_spans,
    plan_batches,
    unique_questions,
)
from nanochat_core.evaluation.spans import Span
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
Floats = npt.NDArray[np.float64]


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
    unique, members = unique_questions(questions)
    with torch.no_grad():
        if share is not None and not (any(len(q) > 1 for q in unique) and _cache_goes_back(model, device)):
            share = None
        budget = batch_tokens or (BATCH_TOKENS_CPU if device.type == "cpu" else BATCH_TOKENS)
        mine = deal_batches(plan_batches(group_spans(unique, share), budget), size)[rank]
        offsets = np.cumsum([0, *(len(q) for q in unique)])  # index of each question's first span
        results = np.zeros((int(offsets[-1]), 4))  # of each span: nats, greedy, margin, done
        if mine and math.isfinite(deadline) and time.monotonic() > deadline:
            mine = []
        visible = rank == 0 and bool(title) and sys.stderr.isatty()
        total = sum(batch.tokens for batch in mine)
        with tqdm(total=total, desc=title, unit="tok", unit_scale=True, leave=False, disable=not visible) as bar:
            for batch in mine:
                if time.monotonic() > deadline:
                    break
                for (question, choice), row in _score_batch(model, batch, device, greedy, work):
                    results[offsets[question] + choice] = row
                bar.update(batch.tokens)
    if world is not None and size > 1:
        results = np.array(world.sum(results.ravel().tolist())).reshape(results.shape)
    if not partial and not results[:, 3].all():
        done, everything = int(results[:, 3].sum()), len(results)
        raise OutOfTime(f"time_budget: {done} of {everything} texts were scored in time: give more seconds")
    return [
        [_score(span, results[offsets[question] + choice]) for span, choice in zip(spans, choices, strict=True)]
        for spans, (question, choices) in zip(questions, members, strict=True)
    ]


def _score(span: Span, row: Floats) -> SpanScore:
    nats, greedy, margin, done = row.tolist()
    return SpanScore(nats if done else math.nan, len(span.ids) - span.start, bool(greedy), margin if done else math.nan)


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
    model: Model, batch: SpanBatch, device: torch.device, greedy: bool, work: dict[str, int] | None
) -> list[tuple[tuple[int, int], tuple[float, float, float, float]]]:
    """(nats, greedy, margin, done) of each span of the batch, with its name: (question, choice)."""
    E, P = len(batch.groups), batch.prefix
    widths = [P, *batch.rests]  # positions per group of each pass
    pass_starts = np.cumsum([0, *(E * width for width in widths)])  # positions are numbered through all passes
    # Of each scored token: the position that predicts it, the token itself, the index of its span.
    positions, targets, owners = [], [], []
    names: list[tuple[int, int]] = []
    for e, group in enumerate(batch.groups):
        for c, span in enumerate(group.spans):
            predicted_at = np.arange(span.start - 1, len(span.ids) - 1)
            position = pass_starts[0] + e * P + predicted_at
            if batch.rests:
                in_rest = pass_starts[1 + c] + e * batch.rests[c] + (predicted_at - P)
                position = np.where(predicted_at < P, position, in_rest)
            positions.append(position)
            targets.append(span.ids[span.start :])
            owners.append(np.full(len(predicted_at), len(names)))
            names.append(group.names[c])
    scored_positions, rows_M = np.unique(np.concatenate(positions), return_inverse=True)
    states_ND = _hidden_states(model, batch, scored_positions, pass_starts, widths, device)
    nats_M, greedy_M, margin_M = _score_tokens(model, states_ND, rows_M, np.concatenate(targets), greedy)
    owner_M = np.concatenate(owners)
    first_tokens = np.flatnonzero(np.diff(owner_M, prepend=-1))
    nats = np.bincount(owner_M, weights=nats_M, minlength=len(names))
    all_greedy = np.minimum.reduceat(greedy_M, first_tokens)
    margin = np.minimum.reduceat(margin_M, first_tokens)
    if work is not None:
        work["tokens"] = work.get("tokens", 0) + batch.tokens
        work["head"] = work.get("head", 0) + len(scored_positions)
    return [(name, (nats[i], all_greedy[i], margin[i], 1.0)) for i, name in enumerate(names)]


def _hidden_states(
    model: Model,
    batch: SpanBatch,
    scored_positions: Counts,
    pass_starts: Counts,
    widths: list[int],
    device: torch.device,
) -> Tensor:
    """[N, D]: of the positions that predict scored tokens."""
    cache: Any = None
    if batch.rests:
        cache = model.new_cache(len(batch.groups), batch.prefix + max(batch.rests))
    kept = []
    for index, width in enumerate(widths):
        if width == 0:
            continue
        ids_ET = np.zeros((len(batch.groups), width), dtype=np.int64)
        choice, start = (0, 0) if index == 0 else (index - 1, batch.prefix)
        for row, group in zip(ids_ET, batch.groups, strict=True):
            # Padding comes last, where causal attention doesn't see it.
            ids = group.spans[choice].ids[start : min(start + width, group.reads[choice])]
            row[: len(ids)] = ids
        if index > 1:
            cache.length = batch.prefix
        states_ETD = model.hidden(torch.from_numpy(ids_ET).to(device), cache)
        first, end = pass_starts[index], pass_starts[index + 1]
        scored_here = scored_positions[(scored_positions >= first) & (scored_positions < end)] - first
        kept.append(states_ETD.flatten(0, 1).index_select(0, torch.from_numpy(scored_here).to(device)))
    return torch.cat(kept)


def _score_tokens(
    model: Model, states_ND: Tensor, rows_M: Counts, targets_M: Tokens, greedy: bool
) -> tuple[Floats, Floats, Floats]:
    """For each target and the state that predicts it: nats, whether it is the likeliest token, its logit's margin.

    Args:
        rows_M: which row of ``states_ND`` predicts the target.
    """
    elements = LOGITS_CPU if states_ND.is_cpu else LOGITS
    chunk = max(16, elements // model.vocab_size)
    cached_rows = max(4, CACHED_CPU * torch.get_num_threads() // model.vocab_size) if states_ND.is_cpu else chunk
    order = np.argsort(rows_M, kind="stable")
    bounds = np.searchsorted(rows_M[order], range(0, len(states_ND) + chunk, chunk))
    nats_M, greedy_M, margin_M = np.zeros(len(rows_M)), np.zeros(len(rows_M)), np.full(len(rows_M), math.nan)
    for index, states in enumerate(states_ND.split(chunk)):
        logits_NV = model.logits(states)
        tokens = order[bounds[index] : bounds[index + 1]]  # those that this chunk predicts
        row = torch.from_numpy(rows_M[tokens] - index * chunk).to(logits_NV.device)
        target = torch.from_numpy(targets_M[tokens].astype(np.int64)).to(logits_NV.device)
        if greedy:
            top_N2, top_ids_N2 = logits_NV.topk(2)
            likeliest_N = top_ids_N2[:, 0]
            if bool((top_N2[:, 0] == top_N2[:, 1]).any()):
                likeliest_N = logits_NV.argmax(-1)  # the lowest of equal ones, which topk does not promise
            best_other = torch.where(top_ids_N2[:, 0][row] == target, top_N2[:, 1][row], top_N2[:, 0][row])
            greedy_M[tokens] = (likeliest_N[row] == target).cpu().numpy()
            margin_M[tokens] = (logits_NV[row, target] - best_other).double().cpu().numpy()
        # A few rows at a time, which stay in the processor's cache between the passes over them.
        total_N = torch.cat([logits.logsumexp(-1) for logits in logits_NV.split(cached_rows)])
        nats_M[tokens] = (total_N[row] - logits_NV[row, target]).double().cpu().numpy()
    return nats_M, greedy_M, margin_M
