"""EleutherAI's harness on a task with local data, without network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.lm_eval_tasks import ROWS, write_task
from helpers.ranks import on_ranks

from nanochat_core import EvaluatorContext, Model, ModelContext, Tokenizer, World
from nanochat_core.data.tokenizer_cache import build_tokenizer
from nanochat_core.distributed.guarded import EvaluationWorld
from nanochat_core.plugins.choice import Choice, EntryKeys
from nanochat_core.plugins.discovery import load_plugins

pytest.importorskip("lm_eval", reason="the optional library lm-eval is not installed")
CPU = torch.device("cpu")


def parts() -> tuple[Model, Tokenizer]:
    plugins = load_plugins()
    tokens, gpt = plugins["tokenizer"].get("bytes"), plugins["model"].get("gpt")
    assert tokens is not None
    assert gpt is not None
    tokenizer = build_tokenizer(Choice(EntryKeys("bytes"), tokens, tokens.config()))
    torch.manual_seed(0)
    config = gpt.config(depth=1, aspect_ratio=32, head_dim=16)
    model = gpt.load()(config, ModelContext(tokenizer.vocab_size, 64, CPU, torch.float32))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval(), tokenizer


def run(world: World, directory: str) -> dict[str, float]:
    model, tokenizer = parts()
    entry = load_plugins()["evaluator"].get("lm_eval")
    assert entry is not None
    context = EvaluatorContext(tokenizer, EvaluationWorld.of(world), 64, 2, lambda split, tokens: iter(()))
    config = entry.config(tasks=("quiz", "say", "text"), include_path=Path(directory), num_fewshot=0)
    return dict(entry.load()(config, context).evaluate(model, 0).metrics)


def loss(model: Model, ids: list[int], start: int) -> float:
    with torch.no_grad():
        log_p = model.logits(model.hidden(torch.tensor([ids]))[0]).double().log_softmax(-1)
    return -sum(float(log_p[t - 1, ids[t]]) for t in range(start, len(ids)))


def test_local_tasks(tmp_path):
    found = run(World(0, 1, CPU), str(write_task(tmp_path)))
    model, tokenizer = parts()
    right, nats, size = 0, 0.0, 0
    for row in ROWS:
        before = [tokenizer.bos_id, *tokenizer.encode(row["q"])]
        losses = [loss(model, [*before, *tokenizer.encode(f" {c}")], len(before)) for c in row["choices"]]
        right += int(np.argmin(losses)) == row["gold"]
        nats += loss(model, before, 1)
        size += len(row["q"].encode())
    assert found["lm_eval/quiz/acc"] == pytest.approx(right / 3)
    assert found["lm_eval/text/bits_per_byte"] == pytest.approx(nats / np.log(2) / size, rel=1e-4)
    assert found["lm_eval/say/exact_match"] == 0.0


@pytest.mark.xdist_group("ranks")
def test_two_ranks_find_the_same(tmp_path):
    directory = str(write_task(tmp_path))
    both = on_ranks(2, run, directory)
    assert both[0] == pytest.approx(run(World(0, 1, CPU), directory))
    assert both[1] == {}
