"""Scores do not depend on how they are batched, ordered or dealt to ranks; and the rules of spans."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from helpers.ranks import on_ranks
from torch import Tensor, nn

from nanochat_core import (
    Cache,
    EvaluatorContext,
    Model,
    ModelContext,
    Span,
    World,
    cropped_span,
    greedy_match,
    is_close_call,
    pick_choice,
    score_choices,
    score_spans,
)
from nanochat_core.distributed.guarded import EvaluationWorld
from nanochat_core.evaluation.scoring import OutOfTime
from nanochat_core.evaluation.spans import token_spans
from nanochat_core.plugins.discovery import load_plugins

CPU = torch.device("cpu")
V = 40


def gpt(seed: int = 0, **options: Any) -> Model:
    entry = load_plugins()["model"].get("gpt")
    assert entry is not None
    torch.manual_seed(seed)
    config = entry.config(**({"depth": 2, "aspect_ratio": 16, "head_dim": 16} | options))
    model = entry.load()(config, ModelContext(V, 64, CPU, torch.float32))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def questions(count: int = 60, seed: int = 0) -> list[list[Span]]:
    """Questions of one to five choices, with beginnings of all lengths, duplicates and identical choices."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        prompt = [rng.randrange(V) for _ in range(rng.choice([1, 2, 5, 30, 100]))]
        choices = [[rng.randrange(V) for _ in range(rng.randint(1, 6))] for _ in range(rng.randint(1, 5))]
        made.append(token_spans([np.array(prompt + choice, dtype=np.int32) for choice in choices]))
    made.append([*made[0], made[0][0]])
    return [*made, made[3], made[4]]


def plain(model: Model, span: Span) -> float:
    with torch.no_grad():
        log_p_TV = model.logits(model.hidden(torch.tensor(span.ids)[None].long())[0]).double().log_softmax(-1)
    picked = log_p_TV[torch.arange(span.start - 1, len(span.ids) - 1), torch.tensor(span.ids)[span.start :].long()]
    return -float(picked.mean())


def context(world: World, seconds: float = 1e9) -> EvaluatorContext:
    return EvaluatorContext(None, world, 8, 2, lambda split, tokens: iter(()), lambda: seconds)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"n_kv_head": 1, "n_head": 2}, {"softcap": 0.0}])
@pytest.mark.parametrize("batch_tokens", [1, 100, 5000])
@pytest.mark.parametrize("share", [0, 256, None])
def test_batching_and_sharing_change_nothing(options, batch_tokens, share):
    model = gpt(**options)
    found = score_choices(model, questions(), batch_tokens=batch_tokens, share=share)
    for spans, scores in zip(questions(), found, strict=True):
        assert scores == pytest.approx([plain(model, span) for span in spans], abs=1e-4)


def test_what_choices_share_is_computed_once():
    """Four choices of 3 tokens after 100: 100 + 4 x 2 positions are read, and 1 + 4 x 2 of them get logits."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, V, 100)
    asked = [token_spans([np.concatenate([prompt, [c], rng.integers(0, V, 2)]) for c in range(4)])]
    work: dict[str, int] = {}
    score_spans(gpt(), asked, work=work)
    assert work == {"tokens": 100 + 4 * 2, "head": 1 + 4 * 2}
    work = {}
    score_spans(gpt(), asked, share=None, work=work)
    assert work == {"tokens": 4 * 102, "head": 4 * 3}


class Sums(Model):
    """A recurrent model: its state is a running sum, which can't go back although ``length`` can be set."""

    class State:
        def __init__(self) -> None:
            self.length = 0
            self.sum_D = torch.zeros(V)

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size = self.hidden_size = V
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(V, V))

    def hidden(self, ids_BT: Tensor, cache: Cache | None = None) -> Tensor:
        x_BTD = self.table[ids_BT].cumsum(1)
        if cache is not None:
            assert isinstance(cache, Sums.State)
            x_BTD = x_BTD + cache.sum_D
            cache.sum_D = x_BTD[:, -1:]
            cache.length += ids_BT.shape[1]
        return x_BTD

    def logits(self, hidden_ND: Tensor) -> Tensor:
        return hidden_ND

    def new_cache(self, batch_size: int, max_tokens: int) -> Cache:
        return Sums.State()


def test_a_cache_that_does_not_go_back_is_not_used():
    model = Sums()
    for spans, scores in zip(questions(), score_choices(model, questions()), strict=True):
        assert scores == pytest.approx([plain(model, span) for span in spans], rel=1e-4, abs=1e-4)


def test_order_of_questions_and_choices_changes_no_bit():
    model, asked = gpt(), questions()
    found = score_choices(model, asked, batch_tokens=300)
    order = random.Random(1).sample(range(len(asked)), len(asked))
    again = score_choices(model, [asked[i][::-1] for i in order], batch_tokens=300)
    assert [scores[::-1] for scores in again] == [found[i] for i in order]


def _score(world: World) -> list[list[float]]:
    return score_choices(gpt(), questions(), context(EvaluationWorld.of(world)), batch_tokens=300)


@pytest.mark.xdist_group("ranks")
def test_number_of_ranks_changes_no_bit():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = _score(World(0, 1, CPU))
    finally:
        torch.set_num_threads(threads)
    assert on_ranks(3, _score) == [alone] * 3


def test_identical_choices_tie_exactly_and_the_first_wins():
    model = gpt()
    prompt = list(range(20))
    texts = [[*prompt, 5, 6], [*prompt, 7], [*prompt, 5, 6]]
    (scores,) = score_choices(model, [token_spans([np.array(t) for t in texts])])
    assert scores[0] == scores[2]
    assert pick_choice([1.0, 0.5, 0.5]) == 1
    assert not is_close_call([0.5, 0.5, 1.0])
    assert is_close_call([0.5, 0.50005, 0.5])
    assert not is_close_call([0.5])


def test_greedy_match_is_what_greedy_sampling_says():
    from nanochat_core import generate

    model = gpt()
    spans, expected = [], []
    for seed in range(20):
        rng = random.Random(seed)
        prompt = [rng.randrange(V) for _ in range(rng.randint(1, 30))]
        said = list(generate(model, prompt, max_new_tokens=3))
        wrong = [*said[:2], (said[2] + 1) % V]
        spans += [Span([*prompt, *said], len(prompt)), Span([*prompt, *wrong], len(prompt))]
        expected += [True, False]
    assert greedy_match(model, spans) == expected
    margins = [score.margin for (score,) in score_spans(model, [[span] for span in spans], greedy=True)]
    assert [margin > 0 for margin in margins] == expected


def test_equal_logits_are_matched_by_the_lowest_token_only():
    model = gpt()
    nn.init.zeros_(model.head.weight)  # type: ignore[union-attr, arg-type]
    assert greedy_match(model, [Span([3, 0, 0], 1), Span([3, 0, 1], 1)]) == [True, False]


# --------------------------------------------------------------------------------------------------------- spans


def rows(*texts: list[int]) -> list[np.ndarray]:
    return [np.array(text, dtype=np.int32) for text in texts]


@pytest.mark.parametrize(("texts", "starts"), [
    ([[0, 1, 2, 3], [0, 1, 4]], [2, 2]),  # the first difference
    ([[0, 1, 2], [0, 1, 2, 3]], [2, 2]),  # one is the beginning of the other: a token of it is left
    ([[0, 1, 2], [0, 1, 2]], [2, 2]),
    ([[0, 1]], [1]),
])  # fmt: skip
def test_spans_after_a_shared_prefix(texts, starts):
    assert [span.start for span in token_spans(rows(*texts))] == starts


@pytest.mark.parametrize(("texts", "starts"), [
    ([[0, 1, 7, 8], [0, 2, 3, 7, 8]], [2, 3]),
    ([[0, 7, 8], [0, 1, 0, 7, 8]], [1, 3]),  # all of the first is the end of the second: its bos is not scored
    ([[0, 7], [0, 7]], [1, 1]),
    ([[0, 1, 7], [0, 1, 8]], [2, 2]),  # nothing shared: the last token
])  # fmt: skip
def test_spans_before_a_shared_suffix(texts, starts):
    assert [span.start for span in token_spans(rows(*texts), "suffix")] == starts


def test_the_end_of_what_is_too_long_is_kept():
    span = cropped_span(np.arange(10, dtype=np.int32), 7, 5)
    assert (span.ids.tolist(), span.start) == ([5, 6, 7, 8, 9], 2)
    span = cropped_span(np.arange(10, dtype=np.int32), 3, 5)
    assert span.start == 1  # what is scored is too long itself: nothing is before its first token
    assert len(cropped_span(np.arange(10, dtype=np.int32), 7, 20).ids) == 10


@pytest.mark.parametrize("start", [0, 3, 4])
def test_a_span_has_something_before_it_and_something_in_it(start):
    with pytest.raises(ValueError, match="can't be scored"):
        Span([1, 2, 3], start)


def test_out_of_time():
    world = World(0, 1, CPU)
    with pytest.raises(OutOfTime, match="0 of"):
        score_choices(gpt(), questions(), context(world, -1.0))
    scores = score_spans(gpt(), questions(), context(world, -1.0), partial=True)
    assert np.isnan(scores[0][0].nats)
    assert score_choices(gpt(), [], context(world)) == []
