"""Scoring: log-probabilities that a model assigns to given continuations, for many questions at once.

``score_batches.py`` plans which spans are computed together; this module computes them. The common beginning of the
choices of a question is computed once, if the model's cache can be truncated. Logits are computed only for positions
that are scored.

Dimensions in names: E groups of a batch, T positions, D hidden size, V vocabulary, N scored positions, M scored tokens
(choices with a common beginning may have several scored tokens at one position).
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

CLOSE = 1e-4  # nats per token; scores at different batch sizes agree within it, and smaller differences are close calls
BATCH_TOKENS_CPU = 4096
BATCH_TOKENS = 32768
LOGITS_CPU = 2**23 - 2**16  # logits computed at once: less than 32 MiB, below which malloc reuses memory
LOGITS = 2**27
WORTH_SHARING = 256  # positions; saving fewer does not repay the added passes (on a CPU at depth 4)
CACHED_CPU = 2**17  # logits that fit into the cache of a core

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class OutOfTime(NanochatError):
    """Error: the ``time_budget`` of an evaluation ended before everything was scored."""


@attrs.frozen
class SpanScore:
    """The score that a model gives to the scored tokens of a span.

    Args:
        nats: sum of their negative log-probabilities; NaN if the time ran out before they were scored.
        tokens: number of scored tokens.
        greedy: whether each of them is the most likely token after those before it (the lowest id among equals).
        margin: the smallest difference between the logit of a scored token and the largest other logit at its
            position; negative if another token is more likely there.
    """

    nats: float
    tokens: int
    greedy: bool
    margin: float

    @property
    def mean(self) -> float:
        """Nats per scored token."""
        return self.nats / self.tokens


def score_choices(
    model: Model, questions: Sequence[Sequence[Span]], context: EvaluatorContext | None = None, **options: Any
) -> list[list[float]]:
    """Return the nats per token of each choice of each question. The model prefers the lowest, see ``pick_choice``.

    Args:
        model, questions, context, options: the arguments of ``score_spans``.
    """
    return [[score.mean for score in scores] for scores in score_spans(model, questions, context, **options)]


def greedy_match(
    model: Model, spans: Sequence[Span], context: EvaluatorContext | None = None, **options: Any
) -> list[bool]:
    """Return for each span whether greedy sampling would continue its context with exactly its scored tokens.

    Args:
        model, context, options: the arguments of ``score_spans``.
    """
    scores = score_spans(model, [[span] for span in spans], context, greedy=True, **options)
    return [score.greedy for (score,) in scores]


def pick_choice(scores: Sequence[float]) -> int:
    """Return the index of the lowest score, the first among equals."""
    return min(range(len(scores)), key=scores.__getitem__)


def is_close_call(scores: Sequence[float]) -> bool:
    """Whether the two lowest distinct scores differ by less than ``CLOSE``, so that another batch size might change
    the choice. Exact ties do not count: they come from identical choices, of which the first is always chosen."""
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
    """Score every span of every question. Collective: every rank passes the same arguments, computes its share of the
    batches, and gets all scores.

    Args:
        model: the model, in eval mode.
        questions: spans that belong together, such as the choices of one question; their common beginning is computed
            once.
        context: the context of the evaluator, with the ranks and the time budget; None: this process works alone.
        greedy: also compute ``greedy`` and ``margin``, which takes a little longer; otherwise they are False and NaN.
        batch_tokens: maximum number of positions of a forward pass (a single larger question exceeds it); None: a
            default for the device.
        share: number of positions that computing the common beginning of a question once must save; None: never.
        partial: return NaN nats for spans that were not scored in time, instead of raising.
        title: title of the progress bar; empty for none.
        work: a dict to which the numbers of computed positions (``tokens``) and of positions with logits (``head``)
            are added.

    Returns:
        The scores, in the order of ``questions`` and their spans.

    Raises:
        OutOfTime: on all ranks, when the time budget ended before everything was scored.
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
        raise OutOfTime(f"time_budget: {done} of {everything} texts were scored in time: increase it")
    return [
        [_score(span, results[offsets[question] + choice]) for span, choice in zip(spans, choices, strict=True)]
        for spans, (question, choices) in zip(questions, members, strict=True)
    ]


def _score(span: Span, row: Floats) -> SpanScore:
    nats, greedy, margin, done = row.tolist()
    return SpanScore(nats if done else math.nan, len(span.ids) - span.start, bool(greedy), margin if done else math.nan)


def _cache_goes_back(model: Model, device: torch.device) -> bool:
    """Whether setting ``length`` truncates the model's cache. It is tested, since a model with a recurrent state might
    accept a new length without forgetting the positions after it."""
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
    """Return for each span of a batch its name, (question, choice), and its (nats, greedy, margin, done)."""
    E, P = len(batch.groups), batch.prefix
    widths = [P, *batch.rests]  # positions per group of each pass
    pass_starts = np.cumsum([0, *(E * width for width in widths)])  # positions are numbered through all passes
    # For each scored token: the position that predicts it, the token itself, and the index of its span.
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
    """Return the hidden states [N, D] of the positions that predict scored tokens."""
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
    """Score targets, each from the hidden state that predicts it.

    Args:
        rows_M: for each target the row of ``states_ND`` that predicts it.

    Returns:
        For each target its nats, whether it is the most likely token (1 or 0), and the margin of its logit.
    """
    elements = LOGITS_CPU if states_ND.is_cpu else LOGITS
    chunk = max(16, elements // model.vocab_size)
    cached_rows = max(4, CACHED_CPU * torch.get_num_threads() // model.vocab_size) if states_ND.is_cpu else chunk
    order = np.argsort(rows_M, kind="stable")
    bounds = np.searchsorted(rows_M[order], range(0, len(states_ND) + chunk, chunk))
    nats_M, greedy_M, margin_M = np.zeros(len(rows_M)), np.zeros(len(rows_M)), np.full(len(rows_M), math.nan)
    for index, states in enumerate(states_ND.split(chunk)):
        logits_NV = model.logits(states)
        tokens = order[bounds[index] : bounds[index + 1]]  # indices of the targets that this chunk predicts
        row = torch.from_numpy(rows_M[tokens] - index * chunk).to(logits_NV.device)
        target = torch.from_numpy(targets_M[tokens].astype(np.int64)).to(logits_NV.device)
        if greedy:
            top_N2, top_ids_N2 = logits_NV.topk(2)
            likeliest_N = top_ids_N2[:, 0]
            if bool((top_N2[:, 0] == top_N2[:, 1]).any()):
                likeliest_N = logits_NV.argmax(-1)  # the lowest id among equals, which topk does not guarantee
            best_other = torch.where(top_ids_N2[:, 0][row] == target, top_N2[:, 1][row], top_N2[:, 0][row])
            greedy_M[tokens] = (likeliest_N[row] == target).cpu().numpy()
            margin_M[tokens] = (logits_NV[row, target] - best_other).double().cpu().numpy()
        # A few rows at a time, so that they stay in the processor's cache between the passes over them.
        total_N = torch.cat([logits.logsumexp(-1) for logits in logits_NV.split(cached_rows)])
        nats_M[tokens] = (total_N[row] - logits_NV[row, target]).double().cpu().numpy()
    return nats_M, greedy_M, margin_M
