"""Bits per byte, against sums by hand."""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import attrs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.ranks import on_ranks
from torch import Tensor, nn

from nanochat_bpb.texts import documents
from nanochat_core import IGNORED, Batch, Cache, DataError, EvaluatorContext, Model, Tokenizer, Tokens, World
from nanochat_core.plugins.discovery import load_plugins

BYTES = (1, 2, 3, 4, 0)  # bytes of tokens 0..4; the last is bos
WORLD = World(rank=0, size=1, device=torch.device("cpu"))


class FiveTokens(Tokenizer):
    vocab_size = len(BYTES)
    special_tokens: Mapping[str, int] = {"<|bos|>": 4}
    fingerprint = "five"

    def encode(self, text: str) -> list[int]:
        return [int(c) for c in text]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(b"x" * BYTES[i] for i in ids)

    def token_bytes(self) -> Tokens:
        return np.array(BYTES, dtype=np.int32)

    def save(self, directory: Path) -> None: ...


class Unigram(Model):
    """Every position predicts the same: token i with probability ``P[i]``."""

    P = (0.5, 0.25, 0.125, 0.0625, 0.0625)

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size, self.hidden_size = len(BYTES), 1
        self.log_p = nn.Parameter(torch.tensor(self.P).log())

    def hidden(self, ids_BT: Tensor, cache: Cache | None = None) -> Tensor:
        return torch.ones(*ids_BT.shape, 1)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        return hidden_ND * self.log_p


def evaluate(targets: list[list[list[int]]], world: World = WORLD, **options) -> float:
    """The metric over batches of targets."""
    asked = []

    def rows(split: str, tokens: int) -> Iterator[Batch]:
        asked.append((split, tokens))
        for batch in targets:
            targets_BT = torch.tensor(batch)
            yield Batch(targets_BT.clamp(min=0), targets_BT)

    entry = load_plugins("bpb")["evaluator"].get("bpb")
    assert entry is not None
    config = entry.config(**options)
    evaluator = entry.load()(config, EvaluatorContext(FiveTokens(), world, 4, 2, rows))
    with torch.no_grad():
        metrics = evaluator.evaluate(Unigram(), 7).metrics
    assert asked == [(config.split, config.eval_tokens)]
    assert list(metrics) == [f"{config.split}/bpb"]
    return metrics[f"{config.split}/bpb"]


BATCHES = [[[0, 1, 2, 3], [3, 3, 4, 1]], [[2, 4, 0, IGNORED], [IGNORED] * 4]]
# Bits of tokens 0..3 are 1, 2, 3, 4; bos (4 bits, no bytes) and ignored targets count neither.
BITS, N_BYTES = (1 + 2 + 3 + 4) + (4 + 4 + 2) + (3 + 1), (1 + 2 + 3 + 4) + (4 + 4 + 2) + (3 + 1)


def test_sums_by_hand():
    assert evaluate(BATCHES) == pytest.approx(BITS / N_BYTES, rel=1e-6)
    assert evaluate([[[0, 0, 3, 4]]]) == pytest.approx((1 + 1 + 4) / (1 + 1 + 4))
    assert evaluate([[[4, 3, IGNORED, 4]], [[2, 2, 2, 4]]], split="train", eval_tokens=99) == pytest.approx(1.0)


def test_is_not_one_by_accident(monkeypatch):
    monkeypatch.setattr(Unigram, "P", (0.0625, 0.0625, 0.125, 0.25, 0.5))  # bits 4, 4, 3, 2, 1
    assert evaluate(BATCHES) == pytest.approx((4 + 4 + 3 + 2 + 2 + 2 + 4 + 3 + 4) / N_BYTES, rel=1e-6)


def test_how_rows_are_batched_does_not_matter():
    rows = [row for batch in BATCHES for row in batch]
    assert evaluate([[row] for row in rows]) == pytest.approx(evaluate([rows]), rel=1e-6)


@pytest.mark.parametrize("batches", [[], [[[IGNORED, 4, IGNORED, 4]]]])
def test_nothing_to_predict_is_an_error(batches):
    with pytest.raises(DataError, match="val split has no byte to predict"):
        evaluate(batches)


def test_sets_of_ones_own_and_both_splits(tmp_path):
    """Token i is written as the digit i; each document is led by bos."""
    (tmp_path / "a.jsonl").write_text('{"text": "0123"}\n\n{"text": "33"}\n')
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "1.txt").write_text("0")
    (tmp_path / "many" / "2.txt").write_text("000")
    pq.write_table(pa.table({"text": ["1", "2"]}), tmp_path / "c.parquet")
    entry = load_plugins("bpb")["evaluator"].get("bpb")
    assert entry is not None
    make = {f.name: f for f in attrs.fields(entry.config)}["sets"].type.__args__[0]
    sets = tuple(make(name, tmp_path / path) for name, path in {"a": "a.jsonl", "b": "many", "c": "c.parquet"}.items())
    config = entry.config(split="both", sets=sets)
    batches = [Batch(torch.tensor([[1]]), torch.tensor([[1]]))]
    evaluator = entry.load()(config, EvaluatorContext(FiveTokens(), WORLD, 2, 2, lambda split, tokens: iter(batches)))
    with torch.no_grad():
        metrics = evaluator.evaluate(Unigram(), 0).metrics
    expected = {"val": 1.0, "train": 1.0, "a": (1 + 2 + 3 + 4 + 4 + 4) / (1 + 2 + 3 + 4 + 4 + 4), "b": 1.0, "c": 5 / 5}
    assert metrics == pytest.approx({f"{name}/bpb": value for name, value in expected.items()})
    with pytest.raises(ValueError, match="must have different names"):
        entry.config(sets=(make("val", tmp_path),))


def test_out_of_time_is_marked():
    left = iter([1.0, -1.0])
    entry = load_plugins("bpb")["evaluator"].get("bpb")
    assert entry is not None
    batches = [Batch(t.clamp(min=0), t) for t in map(torch.tensor, BATCHES)]
    context = EvaluatorContext(FiveTokens(), WORLD, 4, 2, lambda split, tokens: iter(batches), lambda: next(left))
    with torch.no_grad():
        metrics = entry.load()(entry.config(), context).evaluate(Unigram(), 0).metrics
    assert metrics == {"val/bpb_partial": pytest.approx((1 + 2 + 3 + 4 + 4 + 4 + 2) / (1 + 2 + 3 + 4 + 4 + 4 + 2))}


def test_entry():
    entry = load_plugins("bpb")["evaluator"].get("bpb")
    assert entry is not None
    assert entry.defaults == {"every": 250, "at_start": True, "at_end": True}
    assert entry.aliases == {"eval_every": "every"}
    assert entry.config().eval_tokens == 20 * 524288


def _agree(world: World) -> float:
    mine = BATCHES if world.rank == 0 else []  # a rank without rows still takes part
    assert math.isclose(evaluate(mine, world), BITS / N_BYTES, rel_tol=1e-6)
    with pytest.raises(DataError):
        evaluate([], world)
    return evaluate([BATCHES[world.rank]], world)


@pytest.mark.xdist_group("ranks")
def test_two_ranks_agree():
    both = on_ranks(2, _agree)
    assert both[0] == both[1]
    assert math.isclose(both[0], BITS / N_BYTES, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"\xef\xbb\xbf012"),
        ("a.txt.gz", gzip.compress(b"012")),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "012"}\n  \n{"text": null}\n'),
        ("a.jsonl.gz", gzip.compress(b'{"text": "012"}\n')),
    ],
)
def test_sets_are_read_as_data_sources_are(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "._a.txt").write_bytes(b"\0\0")
    assert "".join(documents(tmp_path / name)) == "012"


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", b'{"text": "0"}\n{"text": 5}\n', r"line 2: field 'text' holds int"),
        ("a.jsonl", b'{"words": "0"}\n', r"line 1: no field 'text': it has 'words'"),
        ("a.jsonl", b"[1,\n2]", r"not one object per line"),
        ("a.txt", "0".encode("utf-16"), r"UTF-16"),
        ("a.parquet", b"no", r"can't be read"),
    ],
)
def test_sets_that_can_t_be_read(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"^sets: .*{name}.*{problem}"):
        list(documents(tmp_path / name))
