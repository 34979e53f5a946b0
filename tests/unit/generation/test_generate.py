"""Sampling, with small models that have a cache, or none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nanochat_core import Cache, Model, NanochatError
from nanochat_core.generation.generate import generate

V = 11


class SumCache:
    """The sum of the embeddings read so far is all the model remembers."""

    def __init__(self, max_tokens: int) -> None:
        self.length = 0
        self.max_tokens = max_tokens
        self.sum_1D: Tensor | float = 0.0


class Summing(Model):
    """The next token depends on the sum over the whole prefix, so a forgotten or repeated token shows."""

    def __init__(self, cached: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vocab_size, self.hidden_size = V, 8
        self.embed = nn.Embedding(V, 8)
        self.head = nn.Linear(8, V, bias=False)
        self.cached = cached
        self.positions_read = self.logits_asked = 0

    def hidden(self, ids_BT: Tensor, cache: Cache | None = None) -> Tensor:
        self.positions_read += ids_BT.shape[1]
        x_BTD = self.embed(ids_BT).cumsum(1)
        if cache is not None:
            assert isinstance(cache, SumCache)
            x_BTD = x_BTD + cache.sum_1D
            cache.sum_1D = x_BTD[:, -1]
            cache.length += ids_BT.shape[1]
            assert cache.length <= cache.max_tokens
        return x_BTD.sin()

    def logits(self, hidden_ND: Tensor) -> Tensor:
        self.logits_asked += hidden_ND.shape[0]
        return 5 * self.head(hidden_ND)

    def new_cache(self, batch_size: int, max_tokens: int) -> SumCache | None:
        assert batch_size == 1
        return SumCache(max_tokens) if self.cached else None


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 3}])
def test_same_tokens_with_and_without_cache(options):
    with_cache, without = Summing(cached=True), Summing(cached=False)
    tokens = list(generate(with_cache, [1, 2, 3], max_new_tokens=20, **options))
    assert tokens == list(generate(without, [1, 2, 3], max_new_tokens=20, **options))
    assert len(tokens) == 20
    assert len(set(tokens)) > 2  # not a constant, which would compare equal too
    assert with_cache.positions_read == 3 + 19
    assert without.positions_read == sum(range(3, 23))
    assert with_cache.logits_asked == without.logits_asked == 20


def test_greedy_takes_the_likeliest_token():
    model, ids = Summing(cached=False), [4]
    for _ in range(5):
        with torch.no_grad():
            ids.append(int(model.logits(model.hidden(torch.tensor([ids]))[:, -1]).argmax()))
    assert list(generate(Summing(cached=True), [4], max_new_tokens=5)) == ids[1:]


def test_sampling_follows_the_softmax():
    model = Summing(cached=False)
    with torch.no_grad():
        wanted_V = (model.logits(model.hidden(torch.tensor([[4]]))[:, -1])[0] / 2).softmax(-1)
    drawn = [next(generate(model, [4], max_new_tokens=1, temperature=2.0, seed=s)) for s in range(2000)]
    seen_V = torch.bincount(torch.tensor(drawn), minlength=V) / len(drawn)
    assert (seen_V - wanted_V).abs().max() < 0.04
    top = set(wanted_V.topk(2).indices.tolist())
    drawn = [next(generate(model, [4], max_new_tokens=1, temperature=2.0, top_k=2, seed=s)) for s in range(200)]
    assert set(drawn) == top


def test_seed_decides_and_global_generator_is_left_alone():
    model = Summing(cached=True)

    def sample(seed: int) -> list[int]:
        return list(generate(model, [0], max_new_tokens=30, temperature=1.0, seed=seed))

    state = torch.get_rng_state()
    assert sample(1) == sample(1) != sample(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_tiny_temperature_is_greedy():
    greedy = list(generate(Summing(cached=True), [1], max_new_tokens=8))
    assert list(generate(Summing(cached=True), [1], max_new_tokens=8, temperature=1e-30)) == greedy


def test_stops_before_a_stop_token():
    whole = list(generate(Summing(cached=True), [1, 2, 3], max_new_tokens=20, temperature=1.0))
    stop = whole[7]
    stopped = list(generate(Summing(cached=True), [1, 2, 3], max_new_tokens=20, temperature=1.0, stop=(stop,)))
    assert stopped == whole[: whole.index(stop)]


def test_tokens_beyond_the_vocabulary_never_come():
    tokens = list(generate(Summing(cached=True), [1], max_new_tokens=60, temperature=9.0, vocab_size=4))
    assert set(tokens) == {0, 1, 2, 3}


def test_gradient_mode_does_not_leak_to_the_caller_between_tokens():
    stream = generate(Summing(cached=True), [1], max_new_tokens=2)
    next(stream)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_nothing_asked_nothing_computed():
    model = Summing(cached=True)
    assert list(generate(model, [1], max_new_tokens=0)) == []
    assert model.positions_read == 0


@pytest.mark.parametrize(
    ("ids", "options", "words"),
    [([], {}, "at least one token"), ([1], {"temperature": -1}, "temperature"), ([1], {"top_k": 0}, "top_k")],
)
def test_mistakes_are_told_at_once(ids, options, words):
    with pytest.raises(NanochatError, match=words):
        generate(Summing(cached=True), ids, max_new_tokens=1, **options)
