"""The classic model against NanoChat of transformers: another implementation of it, by other people."""

from __future__ import annotations

import logging
from typing import Any

import attrs
import pytest
import torch

from nanochat_core import ConfigError, ModelContext
from nanochat_gpt import transformers_names as names
from nanochat_gpt.config import GPTConfig
from nanochat_gpt.model import GPT, build

transformers = pytest.importorskip("transformers", minversion="5.0", reason="the optional library transformers >= 5.0")

T = 24
# Options and vocabulary.
CASES = {
    "classic": (GPTConfig(depth=4, aspect_ratio=16, head_dim=16, norm_eps=1e-6), 128),
    "grouped queries": (GPTConfig(depth=2, aspect_ratio=32, head_dim=16, n_kv_head=2, norm_eps=1e-6), 192),
    "one key head, padded vocabulary": (GPTConfig(depth=2, aspect_ratio=32, head_dim=8, n_kv_head=1), 101),
    "width rounded up": (GPTConfig(depth=5, aspect_ratio=16, head_dim=32), 65),
    "other numbers": (GPTConfig(depth=3, aspect_ratio=16, head_dim=16, softcap=30.0, rope_base=500.0), 64),
    "no softcap": (GPTConfig(depth=1, aspect_ratio=64, head_dim=32, softcap=0.0, norm_eps=1e-3), 77),
}


@pytest.fixture(params=CASES.values(), ids=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[GPTConfig, int]:
    return request.param


def ours(config: GPTConfig, vocab_size: int) -> GPT:
    """Float32, every matrix filled with numbers that matter."""
    model = build(config, ModelContext(vocab_size, T, torch.device("cpu"), torch.float32))
    fill(model, 0)
    with torch.no_grad():
        model.head.weight[vocab_size:] = 0
    return model.eval()


def theirs(config: GPTConfig, vocab_size: int) -> Any:
    logging.getLogger("transformers").setLevel(logging.ERROR)  # of special tokens that the vocabulary lacks
    arguments = names.to_nanochat_config(config, vocab_size, T)
    model = transformers.NanoChatForCausalLM(
        transformers.NanoChatConfig(**arguments, bos_token_id=None, eos_token_id=None)
    )
    fill(model, 1)
    return model.eval()


def fill(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)


def ids(vocab_size: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (3, T), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def assert_same_logits(model: GPT, other: Any, vocab_size: int) -> None:
    ids_BT = ids(vocab_size)
    logits_BTV = model.logits(model.hidden(ids_BT).flatten(0, 1)).view(3, T, -1)
    expected_BTV = other(input_ids=ids_BT).logits
    assert expected_BTV.dtype == torch.float32
    assert expected_BTV.std() > 0.1
    torch.testing.assert_close(logits_BTV, expected_BTV, rtol=0, atol=1e-5)


def test_their_model_with_our_weights_gives_our_logits(case: tuple[GPTConfig, int]) -> None:
    model, other = ours(*case), theirs(*case)
    other.load_state_dict(names.to_nanochat_weights(model.state_dict(), case[1]))
    assert_same_logits(model, other, case[1])


def test_our_model_with_their_config_and_weights_gives_their_logits(case: tuple[GPTConfig, int]) -> None:
    other = theirs(*case)
    config = names.from_nanochat_config(other.config.to_dict())
    assert config.shape() == case[0].shape()
    model = ours(config, case[1])
    model.load_state_dict(names.from_nanochat_weights(other.state_dict()))
    assert_same_logits(model, other, case[1])


def test_there_and_back_is_the_same_state(case: tuple[GPTConfig, int]) -> None:
    model, other = ours(*case), theirs(*case)
    for state, back in (
        (model.state_dict(), names.from_nanochat_weights(names.to_nanochat_weights(model.state_dict(), case[1]))),
        (other.state_dict(), names.to_nanochat_weights(names.from_nanochat_weights(other.state_dict()), case[1])),
    ):
        assert list(back) == list(state)
        for name, tensor in state.items():
            assert torch.equal(back[name], tensor), name


def test_training_gradients_agree(case: tuple[GPTConfig, int]) -> None:
    model, other = ours(*case), theirs(*case)
    other.load_state_dict(names.to_nanochat_weights(model.state_dict(), case[1]))
    ids_BT = ids(case[1])
    targets_BT = torch.cat([ids_BT[:, 1:], torch.full((3, 1), -1)], dim=1)
    count = 3 * (T - 1)
    (model(ids_BT, targets_BT) / count).backward()
    loss = other(input_ids=ids_BT, labels=ids_BT).loss  # it shifts by itself
    loss.backward()
    gradients = names.to_nanochat_weights({n: p.grad for n, p in model.named_parameters()}, case[1])
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: n + m)


def test_options_that_it_lacks_are_named() -> None:
    beyond = [f.name for f in attrs.fields(GPTConfig) if f.name not in names.SHARED | names.IRRELEVANT]
    config = GPTConfig(depth=1)
    for name in beyond:
        value = getattr(config, name)
        other: object = {bool: not value, str: "S" + str(value)}.get(type(value), 1.5)
        with pytest.raises(ConfigError, match=rf"model\.{name}: NanoChat of transformers does not support {other!r}"):
            names.to_nanochat_config(attrs.evolve(config, **{name: other}), 64, T)


def test_what_ours_lacks_is_named() -> None:
    good = names.to_nanochat_config(GPTConfig(depth=2, aspect_ratio=16, head_dim=8), 64, T)
    for key, value in {
        "hidden_act": "silu",
        "intermediate_size": 100,
        "head_dim": 6,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4},
        "hidden_size": 34,  # four heads
    }.items():
        with pytest.raises(ConfigError, match=rf"{key}: gpt does not support"):
            names.from_nanochat_config({**good, key: value})
    with pytest.raises(ConfigError, match="no aspect_ratio gives it"):
        names.from_nanochat_config({**good, "num_hidden_layers": 16, "hidden_size": 24, "intermediate_size": 96})


def test_weights_it_lacks_are_named() -> None:
    model = ours(GPTConfig(depth=1, aspect_ratio=16, head_dim=8), 64)
    state = {**model.state_dict(), "blocks.0.attention.gate.weight": torch.zeros(1)}
    with pytest.raises(ConfigError, match=r"blocks\.0\.attention\.gate\.weight: a parameter that the other"):
        names.to_nanochat_weights(state, 64)
