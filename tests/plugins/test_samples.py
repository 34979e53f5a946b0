"""Samples of a model that counts bytes upwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nanochat_core import Cache, EvaluatorContext, Model, Tokenizer, Tokens, World
from nanochat_core.plugins.discovery import load_plugins

BOS = 128


class Ascii(Tokenizer):
    vocab_size = 129
    special_tokens: Mapping[str, int] = {"<|bos|>": BOS}
    fingerprint = "ascii"

    def encode(self, text: str) -> list[int]:
        return list(text.encode("ascii"))

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(b"<|bos|>" if i == BOS else bytes([i]) for i in ids)

    def token_bytes(self) -> Tokens:
        return np.array([1] * 128 + [0], dtype=np.int32)

    def save(self, directory: Path) -> None: ...


class Counting(Model):
    """After byte b comes b + 1, after "z" a new document. It has more rows than the tokenizer has tokens, and likes
    those best."""

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size = self.hidden_size = 192
        self.weight = nn.Parameter(torch.zeros(()))
        self.prompts: list[list[int]] = []

    def hidden(self, ids_BT: Tensor, cache: Cache | None = None) -> Tensor:
        self.prompts.append(ids_BT[0].tolist())
        following_BT = torch.where(ids_BT == ord("z"), BOS, ids_BT + 1)
        logits_BTV = nn.functional.one_hot(following_BT, 192).float()
        logits_BTV[..., 129:] = 2.0
        return logits_BTV + self.weight

    def logits(self, hidden_ND: Tensor) -> Tensor:
        return hidden_ND


def samples(rank: int = 0, **options) -> tuple[Mapping[str, str], list[list[int]]]:
    entry = load_plugins("samples")["evaluator"].get("samples")
    assert entry is not None
    world = World(rank=rank, size=2, device=torch.device("cpu"))
    context = EvaluatorContext(Ascii(), world, 16, 2, lambda split, tokens: iter(()))
    model = Counting()
    found = entry.load()(entry.config(**options), context).evaluate(model, 0)
    assert found.metrics == {}
    return found.texts, model.prompts


def test_prompt_and_continuation_led_by_bos():
    texts, prompts = samples(prompts=("say a", "1"), max_new_tokens=4)
    assert texts == {"samples/0": "say abcde", "samples/1": "12345"}
    assert [BOS, *b"say a"] in prompts


def test_ends_with_the_document():
    assert samples(prompts=("w",))[0] == {"samples/0": "wxyz"}


def test_seven_prompts_by_default():
    texts, _ = samples()
    assert len(texts) == 7
    assert texts["samples/0"] == "The capital of France istuvwxyz"
    assert texts["samples/4"] == "The planets of the solar system are:;<=>?@ABCDEFGHIJ"  # 16 tokens


def test_sampling_repeats_with_its_seed():
    hot = {"prompts": ("a",), "temperature": 5.0, "max_new_tokens": 10}
    assert samples(**hot, seed=1) == samples(**hot, seed=1)
    assert samples(**hot, seed=1)[0] != samples(**hot, seed=2)[0]
    assert samples(**hot, top_k=1)[0] == {"samples/0": "abcdefghijk"}


def test_greedy_and_sampled():
    texts, _ = samples(prompts=("a", "b"), num_sampled=2, sampled_temperature=20.0, max_new_tokens=8)
    assert list(texts) == [f"samples/{i}{k}" for i in range(2) for k in ("", "/sampled/0", "/sampled/1")]
    assert texts["samples/0"] == "abcdefghi"
    assert len({texts["samples/0"], texts["samples/0/sampled/0"], texts["samples/0/sampled/1"]}) == 3
    assert texts == samples(prompts=("a", "b"), num_sampled=2, sampled_temperature=20.0, max_new_tokens=8)[0]


def test_only_rank_0_writes():
    texts, prompts = samples(rank=1)
    assert texts == {}
    assert prompts == []


@pytest.mark.parametrize(("key", "value"), [("every", 2000), ("at_start", False), ("at_end", True)])
def test_entry(key, value):
    entry = load_plugins("samples")["evaluator"].get("samples")
    assert entry is not None
    assert entry.defaults[key] == value
    assert entry.aliases == {"sample_every": "every"}
