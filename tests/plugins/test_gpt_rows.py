"""Rows of different lengths in one cache: each is as if it were alone."""

from __future__ import annotations

import random

import pytest
import torch
from helpers.gpt_reading import ALL, CONFIGS, SMALL, VOCAB, T, make
from torch import Tensor

from nanochat_core.hardware.casting import weights_at_rest
from nanochat_gpt.config import GPTConfig
from nanochat_gpt.model import GPT

ROWS, ROOM = 5, 24


class Reader:
    """Reads random tokens into rows, and compares all states with the full forward pass."""

    def __init__(self, model: GPT, seed: int = 0) -> None:
        self.model, self.cache = model, model.new_row_cache(ROWS, ROOM)
        self.random = random.Random(seed)
        self.texts: list[list[int]] = [[] for _ in range(ROWS)]

    def tokens(self, count: int) -> list[int]:
        return [self.random.randrange(VOCAB) for _ in range(count)]

    def read(self, start: int, counts: list[int]) -> None:
        new = [self.tokens(count) for count in counts]
        width = max(1, *counts)
        ids_BT = torch.tensor([row + self.tokens(width - len(row)) for row in new])
        with torch.no_grad():
            states = self.model.hidden(ids_BT, self.cache.rows(start, start + len(counts), counts))
        for row, (tokens, state_TD) in enumerate(zip(new, states, strict=True), start):
            self.texts[row] += tokens
            if tokens:
                expected = self.alone(self.texts[row])[-len(tokens) :]
                torch.testing.assert_close(state_TD[: len(tokens)], expected, rtol=0, atol=1e-10)
        assert list(self.cache.lengths) == [len(text) for text in self.texts]

    def alone(self, text: list[int]) -> Tensor:
        with torch.no_grad():
            return self.model.hidden(torch.tensor([text]))[0]

    def free(self, row: int) -> None:
        self.cache.clear(row)
        self.texts[row] = []

    def copy(self, source: int, target: int, length: int) -> None:
        self.cache.load(target, self.cache.save(source, length), length)
        self.texts[target] = self.texts[source][:length]


@pytest.mark.parametrize("config", CONFIGS)
def test_rows_of_any_lengths_equal_the_full_forward(config: GPTConfig) -> None:
    reader = Reader(make(config))
    reader.read(0, [3, 7, 1, 0, 5])  # prompts in one padded pass
    for _ in range(3):
        reader.read(0, [1] * ROWS)
    reader.read(1, [4, 2])  # a further chunk of two of them
    reader.free(1)
    reader.read(0, [1, 0, 1, 1, 1])  # decoding goes on
    reader.read(1, [6])  # the row is used again
    reader.copy(1, 3, 4)  # a prefix for another row
    reader.copy(1, 0, 6)
    reader.read(0, [1] * ROWS)
    reader.read(0, [2, 5, 1, 3, 1])


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weights_packed_for_decoding_compute_the_same(config: GPTConfig, dtype: torch.dtype) -> None:
    model = make(config, dtype)
    ids = torch.randint(0, VOCAB, (3, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), weights_at_rest():
        for scale in (1.0, 1.1):  # weights that change are packed anew
            for parameter in model.parameters():
                parameter.mul_(scale)
            cache = model.new_row_cache(3, 9)
            model.hidden(ids[:, :4], cache.rows(0, 3, [4, 2, 3]))
            for step in range(4):
                next_ = torch.stack([ids[0, 4 + step], ids[1, 2 + step], ids[2, 3 + step]])[:, None]
                states = model.hidden(next_, cache.rows(0, 3))
            texts = ids[0, :8], ids[1, :6], ids[2, :7]
            whole = torch.stack([model.hidden(text[None])[0, -1] for text in texts])
            tolerance = 1e-10 if dtype == torch.float64 else 1e-4
            torch.testing.assert_close(states[:, 0], whole, rtol=0, atol=tolerance)
            logits = model.logits(whole)
            torch.testing.assert_close(model.logits(whole.repeat(99, 1))[:3], logits, rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("config", [SMALL, ALL])
@pytest.mark.parametrize("seed", range(4))
def test_random_reading_freeing_and_copying(config: GPTConfig, seed: int) -> None:
    reader = Reader(make(config), seed)
    pick = reader.random
    for _ in range(25):
        room = [ROOM - len(text) for text in reader.texts]
        start = pick.randrange(ROWS)
        stop = pick.randrange(start, ROWS) + 1
        action = pick.random()
        if action < 0.2:
            reader.free(start)
        elif action < 0.4 and reader.texts[start]:
            reader.copy(start, pick.randrange(ROWS), pick.randint(0, len(reader.texts[start])))
        else:
            longest = pick.choice((1, 1, 9))
            reader.read(start, [min(pick.randint(0, longest), left) for left in room[start:stop]])


def test_padding_may_lie_beyond_the_end_of_a_row() -> None:
    reader = Reader(make(ALL))
    reader.read(0, [ROOM - 1, ROOM - 1])
    reader.read(0, [1, 1])
    reader.read(0, [0, 0, 5])  # rows that are full read nothing
    reader.read(2, [2, 9])


def test_a_row_that_is_not_finite_leaves_no_trace() -> None:
    reader = Reader(make())
    with torch.no_grad():
        reader.model.embedding.weight[0] = torch.nan
    reader.tokens = lambda count: [reader.random.randrange(1, VOCAB) for _ in range(count)]  # type: ignore[method-assign]
    with torch.no_grad():
        reader.model.hidden(torch.zeros(1, 9, dtype=torch.long), reader.cache.rows(0, 1))
    reader.free(0)
    reader.read(0, [3, 9])
    reader.read(0, [1, 1])


def test_more_tokens_than_a_row_holds_are_an_error() -> None:
    reader = Reader(make())
    reader.read(0, [ROOM])
    with pytest.raises(IndexError, match=f"holds {ROOM} positions; {ROOM + 1} were requested"):
        reader.model.hidden(torch.zeros(1, 1, dtype=torch.long), reader.cache.rows(0, 1))


def test_positions_beyond_the_tables() -> None:
    model = make(GPTConfig(depth=1, aspect_ratio=16, head_dim=8))
    long = 10 * T + 5
    cache = model.new_row_cache(2, long + 3)
    ids = torch.randint(0, VOCAB, (2, long + 2), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.hidden(ids[:, :long], cache.rows(0, 2, [long, 4]))
        next_ = torch.stack([ids[0, long:], ids[1, 4:6]])
        states = model.hidden(next_, cache.rows(0, 2))
        torch.testing.assert_close(states[0], model.hidden(ids[:1])[0, long:], rtol=0, atol=1e-9)
        torch.testing.assert_close(states[1], model.hidden(ids[1:, :6])[0, 4:], rtol=0, atol=1e-9)


def test_what_was_saved_fits_into_a_larger_cache() -> None:
    reader = Reader(make(ALL))
    reader.read(0, [3, 7])
    larger = reader.model.new_row_cache(ROWS + 2, 2 * ROOM)
    for row in range(2):
        larger.load(row, reader.cache.save(row, reader.cache.lengths[row]), reader.cache.lengths[row])
    reader.cache = larger
    reader.texts += [[], []]
    reader.read(0, [1, 1, 2])
