from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.gpt_reading import ALL, CONFIGS, SMALL, VOCAB, T, batch, make, norm, recipe_logits

from nanochat_core import ConfigError, ModelContext
from nanochat_gpt.config import GPTConfig
from nanochat_gpt.model import build


@pytest.mark.parametrize("config", CONFIGS)
def test_logits_loss_and_gradients_equal_a_plain_reading_of_the_recipe(config: GPTConfig) -> None:
    model = make(config)
    ids, targets = batch()
    targets[0, :3] = -1
    logits = model.logits(model.hidden(ids).flatten(0, 1)).view(3, T, VOCAB)
    expected = recipe_logits(model, ids)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)

    loss = model(ids, targets)
    expected_loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
    torch.testing.assert_close(loss, expected_loss, rtol=1e-11, atol=0)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    expected_gradients = torch.autograd.grad(expected_loss, parameters)
    for (name, _), ours, theirs in zip(model.named_parameters(), gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_gradients_over_long_rows() -> None:
    """Rows this long take another way through attention."""
    model = make(GPTConfig(depth=1, aspect_ratio=16, head_dim=8, n_kv_head=1))
    ids, targets = batch(1, 300)
    loss, expected = model(ids, targets), F.cross_entropy(recipe_logits(model, ids)[0], targets[0], reduction="sum")
    for ours, theirs in zip(*(torch.autograd.grad(x, list(model.parameters())) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)


@pytest.mark.parametrize("config", [SMALL, ALL])
def test_compiled_training_computes_the_same(config: GPTConfig) -> None:
    """The compiled path uses other formulas than the eager one. Tracing is what counts, so no machine code is made."""
    ids, targets = batch()
    eager, compiled = make(config), make(config)
    compiled.compile_training(backend="eager")
    losses = [model(ids, targets) for model in (eager, compiled)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    for loss in losses:
        loss.backward()
    for ours, theirs in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-10)


def test_per_token_losses_add_up_with_and_without_gradients() -> None:
    model = make()
    ids, targets = batch()
    targets[1, 4:] = -1
    total = model(ids, targets)
    each = model(ids, targets, "none")
    with torch.no_grad():
        each_evaluated, total_evaluated = model(ids, targets, "none"), model(ids, targets)
    assert each.shape == targets.shape
    assert torch.all(each[1, 4:] == 0)
    torch.testing.assert_close(each.sum(), total)
    torch.testing.assert_close(each_evaluated, each.detach())
    torch.testing.assert_close(total_evaluated, total.detach())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("chunks", [[1] * 8, [8], [3, 1, 4], [5, 3]])
def test_cached_chunks_equal_the_full_forward(config: GPTConfig, rows: int, chunks: list[int]) -> None:
    model = make(config)
    ids, _ = batch(rows)
    cache = model.new_cache(rows, T)
    pieces = []
    with torch.no_grad():
        for chunk in ids.split(chunks, dim=1):
            pieces.append(model.hidden(chunk, cache))
        full = model.hidden(ids)
    assert cache.length == T
    torch.testing.assert_close(torch.cat(pieces, 1), full, rtol=0, atol=1e-10)


def test_positions_beyond_ten_times_the_training_length() -> None:
    model = make(GPTConfig(depth=1, aspect_ratio=16, head_dim=8))
    ids, _ = batch(1, 10 * T + 5)
    with torch.no_grad():
        hidden = model.hidden(ids)
        cache = model.new_cache(1, ids.shape[1])
        cached = torch.cat([model.hidden(chunk, cache) for chunk in ids.split(7, dim=1)], 1)
        expected = recipe_logits(model, ids)
    torch.testing.assert_close(model.logits(hidden[0]), expected[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(cached, hidden, rtol=0, atol=1e-9)


def test_a_step_past_the_end_of_the_cache_is_an_error() -> None:
    model = make()
    cache = model.new_cache(1, 3)
    with pytest.raises(IndexError, match="3 positions"), torch.no_grad():
        model.hidden(batch(1, 4)[0], cache)


def test_bfloat16_is_close_to_float32_and_so_are_its_gradients() -> None:
    config = GPTConfig(depth=2, aspect_ratio=32, head_dim=32)
    exact, rough = make(config, torch.float32), make(config, torch.bfloat16)
    rough.load_state_dict(exact.state_dict())
    assert {n: p.dtype for n, p in rough.named_parameters() if p.dtype != torch.float32} == {
        "embedding.weight": torch.bfloat16
    }
    ids, targets = batch(8)
    losses = []
    for model in (exact, rough):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=model is rough):
            loss = model(ids, targets)
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    for (name, a), b in zip(exact.named_parameters(), rough.parameters(), strict=True):
        cosine = F.cosine_similarity(a.grad.flatten(), b.grad.float().flatten(), dim=0)
        assert cosine > 0.99, name


def test_the_gradient_of_a_bfloat16_embedding_is_summed_in_float32() -> None:
    torch.manual_seed(0)
    model = build(
        GPTConfig(depth=1, aspect_ratio=8, head_dim=8), ModelContext(4, 8, torch.device("cpu"), torch.bfloat16)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.zeros(64, 64, dtype=torch.long)  # one token 4,096 times
    rows = model.embedding.weight[ids].float().requires_grad_()
    from nanochat_gpt.ops import embed

    x = embed(ids, model.embedding.weight)
    small = torch.full_like(rows, 2**-12).to(x.dtype)
    x.backward(small)
    torch.testing.assert_close(model.embedding.weight.grad[0].float(), torch.ones(8))  # bfloat16 would stop at 2^-4


def test_at_the_start_logits_are_zero_and_blocks_pass_the_stream_through() -> None:
    torch.manual_seed(0)
    model = build(
        GPTConfig(depth=4, aspect_ratio=32, head_dim=32), ModelContext(200, T, torch.device("cpu"), torch.float32)
    )
    ids, targets = batch()
    assert model(ids, targets).item() == pytest.approx(ids.numel() * math.log(200), rel=1e-6)
    embedded = model.embedding.weight[ids]
    torch.testing.assert_close(model.hidden(ids), norm(norm(embedded, 1e-6), 1e-6), rtol=1e-4, atol=1e-5)
    assert model.blocks[0].mlp.up.weight.std().item() == pytest.approx(1 / math.sqrt(128), rel=0.05)
    assert model.blocks[0].attention.key.weight.std().item() == pytest.approx(1 / math.sqrt(128), rel=0.05)
    assert model.embedding.weight.std().item() == pytest.approx(1, rel=0.05)


def test_same_seed_same_weights_whatever_the_dtype() -> None:
    models = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(3)
        models.append(build(SMALL, ModelContext(VOCAB, T, torch.device("cpu"), dtype)))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a.to(b.dtype), b)


def test_classic_depth_20_has_561_million_parameters() -> None:
    with torch.device("meta"):
        model = build(GPTConfig(), ModelContext(65536, 2048, torch.device("cuda"), torch.bfloat16))
    counts = model.parameter_counts()
    assert counts == {"embedding": 83886080, "matrix": 393216000, "head": 83886080, "total": 560988160}
    assert model.flops_per_token(2048) == 6 * (393216000 + 83886080) + 20 * 12 * 10 * 128 * 2048
    assert model.shape.width == 1280
    assert model.shape.heads == model.shape.kv_heads == 10


@pytest.mark.parametrize(
    ("depth", "width", "heads"),
    [(1, 64, 1), (2, 128, 1), (3, 192, 2), (4, 256, 2), (5, 324, 3), (11, 708, 6), (12, 768, 6)],
)
def test_shape_follows_the_depth(depth: int, width: int, heads: int) -> None:
    shape = GPTConfig(depth=depth).shape()
    assert (shape.width, shape.heads, shape.head_dim) == (width, heads, width // heads)


def test_vocabulary_rows_are_padded_inside_and_cropped_outside() -> None:
    model = make()
    assert model.head.weight.shape[0] == 64
    assert model.logits(model.hidden(batch()[0])[0]).shape == (T, VOCAB)
    with pytest.raises(IndexError):
        model.hidden(torch.tensor([[VOCAB]]))


def test_options_that_contradict_are_config_errors() -> None:
    context = ModelContext(VOCAB, T, torch.device("cpu"), torch.float32)
    with pytest.raises(ConfigError, match=r"^vocab_size: 40 is smaller than the tokenizer's 50"):
        build(GPTConfig(depth=1, vocab_size=40), context)
    with pytest.raises(ValueError, match=r"n_kv_head must divide the 4 query heads \(one of 1, 2, 4\), not 3"):
        GPTConfig(depth=2, aspect_ratio=16, head_dim=8, n_kv_head=3)
    assert build(GPTConfig(depth=1, vocab_size=60), context).vocab_size == 60


def test_the_loss_does_not_depend_on_how_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, targets = batch()
    targets[2, 2:5] = -1
    results = []
    for sizes in ((1000, 1000), (10, 4)):
        monkeypatch.setattr("nanochat_gpt.head.chunk_sizes", lambda *_, s=sizes: s)
        model = make()
        loss = model(ids, targets)
        (3 * loss).backward()
        results.append((loss, model.head.weight.grad, model.embedding.weight.grad))
    for whole, cut in zip(*results, strict=True):
        torch.testing.assert_close(whole, cut, rtol=1e-12, atol=1e-10)
    assert results[0][1].abs().sum() > 0
