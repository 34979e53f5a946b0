"""Conversion of the classic model to ``NanoChatForCausalLM`` of transformers and back: options and weights.

NanoChat of transformers 5.0 and later is the model of this plugin with classic options: the rotation, the order of
rotation and norm, and the softcap are equal. Names differ, and our head is padded to a multiple of 64 rows. The library
transformers is not needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import attrs
from torch import Tensor

from nanochat_core import ConfigError, Problem
from nanochat_gpt.config import GPTConfig

# Options that NanoChat has too, and options that do not change the results of trained weights.
SHARED = frozenset(
    ("depth", "aspect_ratio", "head_dim", "n_head", "n_kv_head", "vocab_size", "softcap", "rope_base", "norm_eps")
)
IRRELEVANT = frozenset(("width_rounding", "window", "init", "fp8", "attention"))

# Our names to theirs; neither model has biases or gains.
_OUTER = {"embedding.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}
_INNER = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}


def to_nanochat_config(config: GPTConfig, vocab_size: int, max_seq_len: int) -> dict[str, Any]:
    """Arguments of ``NanoChatConfig`` for a model with ``config``.

    Ids of special tokens are left out, except that no token is padding: its embedding would not be trained.

    Args:
        config: options of the model.
        vocab_size: of the model.
        max_seq_len: the T that it was trained with; longer texts work too.

    Raises:
        ConfigError: when NanoChat can't express some options, with all of them.
    """
    problems = [
        Problem(
            f"model.{field.name}",
            f"NanoChat of transformers does not support {getattr(config, field.name)!r}, only {field.default!r}",
        )
        for field in attrs.fields(type(config))
        if field.name not in SHARED | IRRELEVANT and getattr(config, field.name) != field.default
    ]
    if problems:
        raise ConfigError(problems)
    shape = config.shape()
    return {
        "vocab_size": vocab_size,
        "hidden_size": shape.width,
        "intermediate_size": 4 * shape.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": max_seq_len,
        "hidden_act": "relu2",
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "final_logit_softcapping": config.softcap or None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "pad_token_id": None,
    }


def from_nanochat_config(theirs: Mapping[str, Any]) -> GPTConfig:
    """Options of ``gpt`` for the model of a ``NanoChatConfig``.

    Args:
        theirs: ``to_dict()`` of the config.

    Raises:
        ConfigError: when ``gpt`` can't express it, with all keys that it does not support.
    """
    width, layers, heads = (theirs[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    rope: Mapping[str, Any] = theirs.get("rope_parameters") or {}
    needed = {
        "hidden_act": "relu2",
        "intermediate_size": 4 * width,
        "head_dim": width // heads,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
    }
    problems = [
        Problem(key, f"gpt does not support {theirs[key]!r}, only {value!r}")
        for key, value in needed.items()
        if theirs.get(key) not in (None, value)
    ]
    if rope.get("rope_type", "default") != "default":
        problems.append(Problem("rope_parameters", f'gpt does not support {rope["rope_type"]!r}, only "default"'))
    if width % heads or (width // heads) % 2:
        problems.append(
            Problem("hidden_size", f"gpt does not support {width}: {heads} heads must have the same even size")
        )
    if problems:
        raise ConfigError(problems)
    config = GPTConfig(
        depth=layers,
        aspect_ratio=max(width // layers, 1),  # rounding up for the heads gives the rest of the width
        head_dim=width // heads,
        n_head=heads,
        n_kv_head=theirs.get("num_key_value_heads") or heads,
        vocab_size=theirs["vocab_size"],
        softcap=float(theirs.get("final_logit_softcapping") or 0.0),
        rope_base=float(rope.get("rope_theta", 10000.0)),
        norm_eps=theirs["rms_norm_eps"],
    )
    if config.shape().width != width:
        message = f"gpt does not support {width} with {layers} layers and {heads} heads: no aspect_ratio gives it"
        raise ConfigError([Problem("hidden_size", message)])
    return config


def to_nanochat_weights(state: Mapping[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """Weights under the names of ``NanoChatForCausalLM``; the head [vocab_size, D] without its padding. Tensors are not
    copied."""
    theirs = {_renamed(name, _OUTER, _INNER, "blocks.", "model.layers."): tensor for name, tensor in state.items()}
    theirs["lm_head.weight"] = theirs["lm_head.weight"][:vocab_size]
    return theirs


def from_nanochat_weights(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of ``NanoChatForCausalLM`` under our names, the head padded with zeros. Other tensors are not copied."""
    outer, inner = ({their: our for our, their in names.items()} for names in (_OUTER, _INNER))
    state = {_renamed(name, outer, inner, "model.layers.", "blocks."): tensor for name, tensor in theirs.items()}
    head_VD = state["head.weight"]
    padded_VD = head_VD.new_zeros(math.ceil(len(head_VD) / 64) * 64, head_VD.shape[1])
    padded_VD[: len(head_VD)] = head_VD
    state["head.weight"] = padded_VD
    return state


def _renamed(name: str, outer: Mapping[str, str], inner: Mapping[str, str], before: str, after: str) -> str:
    """The other model's name of a parameter: ``blocks.3.mlp.up.weight`` is ``model.layers.3.mlp.fc1.weight``.

    Raises:
        ConfigError: for a name that has no counterpart.
    """
    if name in outer:
        return outer[name]
    layer, _, rest = name.removeprefix(before).partition(".")
    matrix = rest.removesuffix(".weight")
    if not name.startswith(before) or not rest.endswith(".weight") or matrix not in inner:
        raise ConfigError([Problem(name, "a parameter that the other model does not have")])
    return f"{after}{layer}.{inner[matrix]}.weight"
