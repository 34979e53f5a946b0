"""The GPT. Shapes: B sequences, T positions, D width, H query heads, K key and value heads, C size of a head."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import attrs
import torch
from torch import Tensor, nn

from nanochat_core import Cache, ConfigError, Model, ModelContext, Resolved
from nanochat_gpt.attention import KVCache, LayerCache, attend
from nanochat_gpt.config import GPTConfig, Shape
from nanochat_gpt.head import MAX_CAP, scaled_head, softcap_cross_entropy
from nanochat_gpt.ops import embed, linear, mlp, rms_norm, rotary_tables, split_heads


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape.heads, shape.kv_heads, shape.head_dim
        kv_width = shape.kv_heads * shape.head_dim
        self.query = nn.Linear(shape.width, shape.width, bias=False)
        self.key = nn.Linear(shape.width, kv_width, bias=False)
        self.value = nn.Linear(shape.width, kv_width, bias=False)
        self.output = nn.Linear(shape.width, shape.width, bias=False)

    def forward(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], eps: float, dtype: torch.dtype, cache: LayerCache | None
    ) -> Tensor:
        B, T, _ = x_BTD.shape
        weight = torch.cat([self.query.weight, self.key.weight, self.value.weight])  # one product instead of three
        qkv_BTSC = linear(x_BTD, weight, dtype).view(B, T, -1, self.head_dim)
        q_HBTC, k_KBTC, v_KBTC = split_heads(qkv_BTSC, self.heads, self.kv_heads, *rotary, eps)
        y_HBTC = attend(q_HBTC, k_KBTC, v_KBTC, cache)
        return linear(y_HBTC.permute(1, 2, 0, 3).reshape(B, T, -1), self.output.weight, dtype)


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BTD: Tensor, dtype: torch.dtype) -> Tensor:
        return mlp(x_BTD, self.up.weight, self.down.weight, dtype)


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention = Attention(shape)
        self.mlp = MLP(shape.width)

    def forward(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], eps: float, dtype: torch.dtype, cache: LayerCache | None
    ) -> Tensor:
        x_BTD = x_BTD + self.attention(rms_norm(x_BTD, eps), rotary, eps, dtype, cache)
        return x_BTD + self.mlp(rms_norm(x_BTD, eps), dtype)


def no_autocast(device: torch.device) -> torch.autocast:
    """The model casts by itself. (On the meta device, where models are planned, autocast does not exist.)"""
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


class GPT(Model):
    """See the options for what can vary.

    Matrices are float32 and cast to ``dtype`` for their products (float64 serves tests). With bfloat16 the embedding
    is stored in bfloat16, and the residual stream has its dtype.

    Args:
        config: the options.
        vocab_size: number of tokens, V.
        max_seq_len: T of the training rows; rotary tables are ready for ten times that, and computed beyond.
        dtype: of the matrix products.
    """

    def __init__(self, config: GPTConfig, vocab_size: int, max_seq_len: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.shape = config, config.shape()
        self.vocab_size, self.hidden_size, self.dtype = vocab_size, self.shape.width, dtype
        self.embedding = nn.Embedding(vocab_size, self.hidden_size)
        self.blocks = nn.ModuleList(Block(self.shape) for _ in range(config.depth))
        # Rows padded to a multiple of 64 make the largest product fast; they take no part in the logits.
        self.head = nn.Linear(self.hidden_size, math.ceil(vocab_size / 64) * 64, bias=False)
        self.initialize()  # in float32, so that one seed gives the same numbers whatever the dtype
        self.to(torch.promote_types(dtype, torch.float32))
        if dtype == torch.bfloat16:
            self.embedding.to(dtype)
        cos_TC, sin_TC = self._rotary_tables(0, 10 * max_seq_len)
        self.register_buffer("cos_TC", cos_TC, persistent=False)
        self.register_buffer("sin_TC", sin_TC, persistent=False)
        self._compiled_block: Callable[..., Tensor] | None = None

    @torch.no_grad()
    def initialize(self) -> None:
        """Classic init: what adds to the residual stream starts at zero, and so do the logits."""
        nn.init.normal_(self.embedding.weight, std=1.0)
        nn.init.zeros_(self.head.weight)
        for block in self.blocks:
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    fan_out, fan_in = module.weight.shape
                    nn.init.normal_(module.weight, std=min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in))
            assert isinstance(block, Block)
            nn.init.zeros_(block.attention.output.weight)
            nn.init.zeros_(block.mlp.down.weight)

    def hidden(self, ids_BT: Tensor, cache: Cache | None = None) -> Tensor:
        assert cache is None or isinstance(cache, KVCache), "a cache comes from new_cache"
        with no_autocast(ids_BT.device):
            x_BTD = embed(ids_BT, self.embedding.weight)
            start = 0
            if cache is not None:
                cache.reserve(ids_BT.shape[1])
                start = cache.length
            rotary = self._rotary(start, start + ids_BT.shape[1])
            training = self.training and torch.is_grad_enabled() and cache is None
            run = self._compiled_block if training and self._compiled_block else Block.__call__
            eps = self.config.norm_eps
            x_BTD = rms_norm(x_BTD, eps)
            for index, block in enumerate(self.blocks):
                x_BTD = run(block, x_BTD, rotary, eps, self.dtype, cache.layer(index) if cache is not None else None)
            if cache is not None:
                cache.length += x_BTD.shape[1]
            return rms_norm(x_BTD, eps)

    def _rotary(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        cos_TC, sin_TC = self.get_buffer("cos_TC"), self.get_buffer("sin_TC")
        if stop > len(cos_TC):
            # The tables stay as they are: compiled training would be compiled anew when they grew.
            cos_TC, sin_TC = (t.to(cos_TC.device) for t in self._rotary_tables(start, stop))
            return cos_TC, sin_TC
        return cos_TC[start:stop], sin_TC[start:stop]

    def _rotary_tables(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        cos_TC, sin_TC = rotary_tables(start, stop, self.shape.head_dim, self.config.rope_base)
        wide = torch.promote_types(self.dtype, torch.float32)
        return cos_TC.to(wide), sin_TC.to(wide)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        with no_autocast(hidden_ND.device):
            cap, weight_VD = self.config.softcap, self.head.weight[: self.vocab_size]
            weight_VD = scaled_head(weight_VD, cap, self.dtype) if cap else weight_VD
            z_NV = linear(hidden_ND, weight_VD, self.dtype)
            z_NV = z_NV.to(torch.promote_types(z_NV.dtype, torch.float32))
            return cap * torch.tanh(z_NV) if cap else z_NV

    def forward(self, ids_BT: Tensor, targets_BT: Tensor, reduction: Literal["sum", "none"] = "sum") -> Tensor:
        cap = self.config.softcap
        if reduction == "none" or not torch.is_grad_enabled() or not 0 < cap <= MAX_CAP:
            return super().forward(ids_BT, targets_BT, reduction)
        hidden_ND = self.hidden(ids_BT).flatten(0, 1)
        with no_autocast(ids_BT.device):
            weight_VD = self.head.weight[: self.vocab_size]
            return softcap_cross_entropy(hidden_ND, weight_VD, targets_BT.flatten(), cap, self.dtype)

    def new_cache(self, batch_size: int, max_tokens: int) -> KVCache:
        weight = self.head.weight
        return KVCache(len(self.blocks), batch_size, self.shape, max_tokens, self.dtype, weight.device)

    def parameter_roles(self) -> Mapping[str, str]:
        special = {"embedding.weight": "embedding", "head.weight": "head"}
        return {name: special.get(name, "matrix") for name, _ in self.named_parameters()}

    def flops_per_token(self, max_seq_len: int) -> float:
        """6 a parameter of a matrix (forward 2, backward 4), and 12 x heads x head size x T a layer for attention."""
        counts = self.parameter_counts()
        attention = 12 * self.shape.heads * self.shape.head_dim * max_seq_len
        return 6.0 * (counts["matrix"] + counts["head"]) + len(self.blocks) * attention

    def reference_counts(self) -> Mapping[str, int]:
        """Those of depth 12 with the same vocabulary and the heads that depth gives."""
        config = attrs.evolve(self.config, depth=12, n_head="auto", n_kv_head="auto")
        with torch.device("meta"):
            return GPT(config, self.vocab_size, 1, self.dtype).parameter_counts()

    def resolved_options(self) -> Mapping[str, Resolved]:
        found = {
            "n_head": Resolved(self.shape.heads, f"ceil(width {self.shape.width} / head_dim {self.config.head_dim})"),
            "n_kv_head": Resolved(self.shape.kv_heads, "as many as n_head"),
            "vocab_size": Resolved(self.vocab_size, "the tokenizer's"),
        }
        return {name: resolved for name, resolved in found.items() if getattr(self.config, name) == "auto"}

    def describe(self) -> Mapping[str, str | int]:
        width = f"{self.shape.width:,}"
        if self.shape.width != self.config.depth * self.config.aspect_ratio:
            width += f" (rounded up from {self.config.depth * self.config.aspect_ratio:,}, so that the heads divide it)"
        shape = self.shape
        return {"layers": self.config.depth, "width": width, "heads": shape.heads, "kv heads": shape.kv_heads}

    def compile_training(self, backend: str = "inductor") -> None:
        """Compile the block that training runs through: once, for all of them, so that depth costs no compile time.

        Evaluation and sampling, whose shapes vary, stay eager, and so do the embedding, whose compiled gradient would
        not repeat, and the head, which is not faster compiled.
        """
        self._compiled_block = torch.compile(Block.forward, dynamic=False, backend=backend)


def build(config: GPTConfig, context: ModelContext) -> GPT:
    """The factory.

    Raises:
        ConfigError: when the vocabulary is smaller than the tokenizer's.
    """
    vocab_size = context.vocab_size if config.vocab_size == "auto" else config.vocab_size
    if vocab_size < context.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {vocab_size} is smaller than the tokenizer's {context.vocab_size}: "
            f'give at least {context.vocab_size}, or "auto"'
        )
    return GPT(config, vocab_size, context.max_seq_len, context.dtype)
