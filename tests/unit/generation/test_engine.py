"""The engine: every continuation is as if it were alone, whatever runs beside it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.gpt_reading import ALL, SMALL, VOCAB, make
from torch import Tensor

from nanochat_core import Cache, Completion, Engine, Event, Model, NanochatError, Request
from nanochat_gpt.model import GPT


class Counting(GPT):
    """Counts the positions that it reads."""

    def hidden(self, ids_BT: Tensor, cache: Cache | None = None) -> Tensor:
        self.read = [*getattr(self, "read", []), tuple(ids_BT.shape)]
        return super().hidden(ids_BT, cache)


class NoRows(Counting):
    def new_row_cache(self, rows: int, max_tokens: int) -> None:  # type: ignore[override]
        return None


class NoCache(NoRows):
    def new_cache(self, batch_size: int, max_tokens: int) -> None:  # type: ignore[override]
        return None


def model_of(kind: type[Counting], config: Any = SMALL) -> Any:
    model = make(config, torch.float32).eval()
    model.__class__ = kind
    return model


KINDS = [Counting, NoRows, NoCache]


def some_request(pick: random.Random) -> Request:
    return Request(
        prompt=[pick.randrange(VOCAB) for _ in range(pick.choice((1, 2, 5, 9, 30)))],
        max_tokens=pick.choice((1, 3, 12, 25)),
        temperature=pick.choice((0.0, 0.5, 1.5)),
        top_k=pick.choice((None, 1, 7)),
        top_p=pick.choice((1.0, 0.8)),
        min_p=pick.choice((0.0, 0.05)),
        repetition_penalty=pick.choice((1.0, 1.3)),
        seed=pick.randrange(1000),
        stop_tokens={pick.randrange(VOCAB)},
        logprobs=pick.choice((None, 2)),
        samples=pick.choice((1, 1, 3)),
    )


def same(a: Completion, b: Completion) -> bool:
    close = torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-3)
    return (a.tokens, a.reason, a.stopped_by) == (b.tokens, b.reason, b.stopped_by) and close


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("config", [SMALL, ALL])
@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_change_nothing(kind: type[Counting], config: Any, seed: int) -> None:
    """Requests arrive at random times, with random parameters, and some are cancelled."""
    pick = random.Random(seed)
    model = model_of(kind, config)
    engine = Engine(model, max_rows=5, chunk=pick.choice((1, 8, 512)), prefix_tokens=pick.choice((0, 100)), context=60)
    requests = [some_request(pick) for _ in range(9)]
    arrived: dict[int, Request] = {}
    cancelled: set[int] = set()
    events: dict[tuple[int, int], list[Event]] = {}
    waiting = list(requests)
    while waiting or engine.busy:
        while waiting and pick.random() < 0.3:
            request = waiting.pop(0)
            arrived[engine.submit(request)] = request
        if arrived and pick.random() < 0.03:
            number = pick.choice(list(arrived))
            cancelled.add(number)
            engine.cancel(number)
        for event in engine.step():
            events.setdefault((event.request, event.sample), []).append(event)
    assert set(events) == {(n, i) for n, request in arrived.items() for i in range(request.samples)}
    alone_of = {n: Engine(model, max_rows=1, context=60).complete([request])[0] for n, request in arrived.items()}
    for (number, sample), found in events.items():
        assert [event.reason is not None for event in found] == [False] * (len(found) - 1) + [True]
        alone = alone_of[number][sample]
        completion = Completion.of(found)
        if completion.reason == "cancelled":
            assert number in cancelled
            assert completion.tokens == alone.tokens[: len(completion.tokens)]
        else:
            assert same(completion, alone), (arrived[number], completion, alone)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_the_likeliest_token_of_the_full_forward(kind: type[Counting]) -> None:
    model, text = model_of(kind), [3, 1, 4]
    for _ in range(10):
        with torch.no_grad():
            text.append(int(model.logits(model.hidden(torch.tensor([text]))[:, -1]).argmax()))
    (completions,) = Engine(model).complete([Request(prompt=[3, 1, 4], max_tokens=10, samples=2)])
    assert [c.tokens for c in completions] == [text[3:], text[3:]]
    assert completions[0].reason == "length"


def test_a_prompt_of_several_samples_is_read_once() -> None:
    model = model_of(Counting)
    prompt = list(range(40))
    (completions,) = Engine(model).complete([Request(prompt=prompt, max_tokens=4, temperature=1.0, samples=6)])
    assert sum(B * T for B, T in model.read) == 40 + 5 + 6 * 3
    assert len({tuple(c.tokens) for c in completions}) > 1
    for sample, completion in enumerate(completions):
        alone = Request(prompt=prompt, max_tokens=4, temperature=1.0, seed=42 + sample)
        assert Engine(model).complete([alone])[0][0].tokens == completion.tokens


def test_sequences_of_different_lengths_share_forward_passes() -> None:
    model = model_of(Counting)
    Engine(model).complete([Request(prompt=[1] * n, max_tokens=20) for n in (3, 9, 5, 17)])
    assert sum(T == 1 for _, T in model.read) == 19


def test_a_long_prompt_is_read_in_pieces_while_others_go_on() -> None:
    model = model_of(Counting)
    engine = Engine(model, chunk=16)
    first = engine.submit(Request(prompt=[1, 2], max_tokens=30))
    engine.step()
    second = engine.submit(Request(prompt=[5] * 50, max_tokens=3))
    seen = []
    while engine.busy:
        seen.append({event.request for event in engine.step() if event.token is not None})
    assert seen[:3] == [{first}] * 3
    assert seen[3] == {first, second}
    assert max(T for _, T in model.read) == 16


def test_the_beginning_of_an_earlier_conversation_is_not_read_again() -> None:
    model = model_of(Counting)
    engine = Engine(model, prefix_tokens=200)
    prompt = [n % VOCAB for n in range(40)]
    ((answer,),) = engine.complete([Request(prompt=prompt, max_tokens=10)])
    model.read = []
    longer = [*prompt, *answer.tokens, 7, 8]
    ((again,),) = engine.complete([Request(prompt=longer, max_tokens=3)])
    assert model.read[0] == (1, 3)  # the last token of the answer had not been read, and the two new ones
    assert again.tokens == Engine(model).complete([Request(prompt=longer, max_tokens=3)])[0][0].tokens
    for n in range(1, 9):  # others push it out
        engine.complete([Request(prompt=[n] * 60, max_tokens=1)])
    model.read = []
    engine.complete([Request(prompt=longer, max_tokens=3)])
    assert model.read[0] == (1, len(longer))
    assert engine._prefixes.tokens <= 200


def test_cancelling_frees_the_row_at_the_next_step() -> None:
    engine = Engine(model_of(Counting), max_rows=1)
    first = engine.submit(Request(prompt=[1], max_tokens=1000))
    second = engine.submit(Request(prompt=[2], max_tokens=2))
    assert {event.request for event in engine.step()} == {first}
    engine.cancel(first)
    events = engine.step()
    assert [(e.request, e.reason) for e in events] == [(first, "cancelled"), (second, None)]
    assert events[1].token is not None


def test_closing_a_stream_cancels_it() -> None:
    engine = Engine(model_of(Counting))
    stream = engine.stream(Request(prompt=[1], max_tokens=1000))
    assert next(stream).token is not None
    stream.close()  # type: ignore[attr-defined]
    engine.step()
    assert not engine.busy


def test_the_context_ends_a_text() -> None:
    engine = Engine(model_of(Counting), context=10)
    ((completion,),) = engine.complete([Request(prompt=[1] * 6, max_tokens=1000)])
    assert (len(completion.tokens), completion.reason) == (4, "length")


@pytest.mark.parametrize("kind", KINDS)
def test_a_huge_maximum_needs_no_memory(kind: type[Counting]) -> None:
    engine = Engine(model_of(kind))
    stream = engine.stream(Request(prompt=[1], max_tokens=10**12))
    assert next(stream).token is not None


def test_logprobs_are_the_models_own() -> None:
    model = model_of(Counting)
    request = Request(prompt=[4, 5], max_tokens=3, temperature=2.0, top_k=3, repetition_penalty=1.5, logprobs=2)
    ((completion,),) = Engine(model).complete([request])
    text = [4, 5, *completion.tokens]
    with torch.no_grad():
        expected = model.logits(model.hidden(torch.tensor([text]))[0, 1:-1]).log_softmax(-1)
    for n, token in enumerate(completion.tokens):
        assert completion.logprobs[n] == pytest.approx(expected[n, token].item(), abs=1e-4)
        best, ids = expected[n].topk(2)
        assert [i for i, _ in completion.top[n]] == ids.tolist()
        assert [p for _, p in completion.top[n]] == pytest.approx(best.tolist(), abs=1e-4)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompt": []}, "prompt: must have at least one token"),
    ({"prompt": [VOCAB]}, f"prompt: has the token {VOCAB}"),
    ({"prompt": [-1]}, "prompt: has the token -1"),
    ({"prompt": [1] * 60}, "prompt: has 60 tokens"),
    ({"max_tokens": -1}, "max_tokens: must be"),
    ({"max_tokens": 2.5}, "max_tokens: must be"),
    ({"temperature": -0.1}, "temperature: must be"),
    ({"temperature": float("nan")}, "temperature: must be"),
    ({"temperature": float("inf")}, "temperature: must be"),
    ({"temperature": 10**400}, "temperature: must be"),
    ({"temperature": "hot"}, "temperature: must be"),
    ({"top_k": 0}, "top_k: must be"),
    ({"top_p": 0}, "top_p: must be"),
    ({"top_p": 1.01}, "top_p: must be"),
    ({"min_p": -0.1}, "min_p: must be"),
    ({"min_p": 1.1}, "min_p: must be"),
    ({"repetition_penalty": 0}, "repetition_penalty: must be"),
    ({"seed": -1}, "seed: must be"),
    ({"seed": 2**63}, "seed: must be"),
    ({"logprobs": 101}, "logprobs: must be"),
    ({"samples": 0}, "samples: must be"),
    ({"stop": ["x", ""]}, "stop: has an entry"),
    ({"stop": "x"}, "stop: must be a list"),
    ({"stop": ["x"]}, "stop: needs a tokenizer"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_mistakes_are_told_before_anything_runs(options: dict[str, Any], message: str) -> None:
    model = model_of(Counting)
    engine = Engine(model, context=60)
    make_request: Callable[[], Request] = lambda: Request(**{"prompt": [1], **options})  # noqa: E731
    with pytest.raises(NanochatError) as error:
        engine.complete([Request(prompt=[1]), make_request()])
    assert str(error.value).startswith(message)
    assert not engine.busy
    assert isinstance(model, Model)
    assert not hasattr(model, "read")
