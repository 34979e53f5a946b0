"""The model ``gpt``.

Shapes: B sequences, T positions, D width, H query heads, K key and value heads, C size of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import attrs
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanochat_core import Cache, ConfigError, Model, ModelContext, Resolved, cast, kept_at_rest, wide_dtype
from nanochat_gpt.attention import Masking, attend, choose_backend, flash3_problem, make_masking
from nanochat_gpt.cache import GPTRowCache, KVCache, LayerCache, Past, RowsView
from nanochat_gpt.config import GATE_CHANNELS, SMEAR_CHANNELS, GPTConfig, Shape, auto_window
from nanochat_gpt.decode import Decoder, capped_logits, decode, make_decoder
from nanochat_gpt.fp8 import fp8_problem
from nanochat_gpt.head import MAX_CAP, softcap_cross_entropy
from nanochat_gpt.initialize import initialize
from nanochat_gpt.ops import embed, linear, mix, mlp, rms_norm, rotary_tables, smear, split_heads

MAX_DECODED = 64  # positions whose logits are computed with packed weights


class Pass(NamedTuple):
    """Inputs that all blocks of one forward pass share.

    Args:
        rotary: cosines and sines of the positions, each [T, C / 2], or [B, T, C / 2] if they differ between rows.
        x0_BTD: the embedded tokens.
        eps: added to the mean square in every RMSNorm.
        dtype: of the matrix products.
        fp8: whether the products are computed in float8.
    """

    rotary: tuple[Tensor, Tensor]
    x0_BTD: Tensor
    eps: float
    dtype: torch.dtype
    fp8: bool


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, shape: Shape, value_embedding: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape.heads, shape.kv_heads, shape.head_dim
        self.qk_scale = config.qk_scale
        kv_width = shape.kv_heads * shape.head_dim
        self.query = nn.Linear(shape.width, shape.width, bias=False)
        self.key = nn.Linear(shape.width, kv_width, bias=False)
        self.value = nn.Linear(shape.width, kv_width, bias=False)
        self.output = nn.Linear(shape.width, shape.width, bias=False)
        self.value_gate = nn.Linear(GATE_CHANNELS, shape.kv_heads, bias=False) if value_embedding else None

    def forward(
        self, x_BTD: Tensor, e_BTD: Tensor | None, common: Pass, masking: Masking, cache: LayerCache | None
    ) -> Tensor:
        B, T, _ = x_BTD.shape
        parts = (self.query, self.key, self.value)
        weight = torch.cat([cast(part.weight, common.dtype) for part in parts])  # one matrix product, not three
        qkv_BTSC = linear(x_BTD, weight, common.dtype, common.fp8).view(B, T, -1, self.head_dim)
        q_HBTC, k_KBTC, v_KBTC = split_heads(
            qkv_BTSC, self.heads, self.kv_heads, *common.rotary, common.eps, self.qk_scale
        )
        if e_BTD is not None:
            assert self.value_gate is not None
            gate_BTK = 3 * torch.sigmoid(linear(x_BTD[..., :GATE_CHANNELS], self.value_gate.weight, common.dtype))
            e_BTKC = gate_BTK[..., None] * e_BTD.view(B, T, self.kv_heads, self.head_dim)
            v_KBTC = v_KBTC + e_BTKC.permute(2, 0, 1, 3)
        y_HBTC = attend(q_HBTC, k_KBTC, v_KBTC, masking, cache)
        y_BTD = y_HBTC.permute(1, 2, 0, 3).reshape(B, T, -1)
        return linear(y_BTD, self.output.weight, common.dtype, common.fp8)


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BTD: Tensor, common: Pass) -> Tensor:
        return mlp(x_BTD, self.up.weight, self.down.weight, common.dtype, common.fp8)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, shape: Shape, value_embedding: bool) -> None:
        super().__init__()
        self.attention = Attention(config, shape, value_embedding)
        self.mlp = MLP(shape.width)

    def forward(
        self,
        x_BTD: Tensor,
        e_BTD: Tensor | None,
        scalars: tuple[Tensor, Tensor] | None,
        common: Pass,
        masking: Masking,
        cache: LayerCache | None,
    ) -> Tensor:
        """Return the residual stream after the block, [B, T, D].

        Args:
            x_BTD: the residual stream.
            e_BTD: value embeddings of the tokens, [B, T, K x C], if the layer has them.
            scalars: r and s of ``residual_scalars``, each ().
            common: inputs that all blocks share.
            masking: attention mask of the layer.
            cache: earlier keys and values of the layer, if any.
        """
        if scalars is not None:
            x_BTD = mix(x_BTD, common.x0_BTD, *scalars)
        x_BTD = x_BTD + self.attention(rms_norm(x_BTD, common.eps), e_BTD, common, masking, cache)
        return x_BTD + self.mlp(rms_norm(x_BTD, common.eps), common)


def no_autocast(device: torch.device) -> torch.autocast:
    """A context without autocast: the model casts by itself. (The meta device, used for planning, has no autocast.)"""
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


class GPT(Model):
    """A decoder-only transformer, with the variants that its options describe.

    Matrices are float32 and cast to ``dtype`` for their products (float64 is for tests). With bfloat16 the embeddings
    are stored in bfloat16, and the residual stream has their dtype.

    Args:
        config: the options.
        context: device, dtype, sequence length, and the vocabulary size that "auto" stands for.
    """

    def __init__(self, config: GPTConfig, context: ModelContext) -> None:
        super().__init__()
        self.config, self.shape, self.context = config, config.shape(), context
        self.vocab_size = context.vocab_size if config.vocab_size == "auto" else config.vocab_size
        self.hidden_size, self.dtype = self.shape.width, context.dtype
        self.windows = config.windows(context.max_seq_len)
        self.embedding = nn.Embedding(self.vocab_size, self.hidden_size)
        has_value = [config.has_value_embedding(layer) for layer in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, self.shape, value) for value in has_value)
        # Rows are padded to a multiple of 64, which makes the largest product fast; the logits leave them out.
        self.head = nn.Linear(self.hidden_size, math.ceil(self.vocab_size / 64) * 64, bias=False)
        kv_width = self.shape.kv_heads * self.shape.head_dim
        self.value_embeddings = nn.ModuleDict(
            {str(layer): nn.Embedding(self.vocab_size, kv_width) for layer, value in enumerate(has_value) if value}
        )
        if config.residual_scalars:
            self.residual_scalars = nn.Parameter(torch.empty(config.depth))
            self.x0_scalars = nn.Parameter(torch.empty(config.depth))
        if config.smear:
            self.smear_gate = nn.Linear(SMEAR_CHANNELS, 1, bias=False)
            self.smear_factor = nn.Parameter(torch.empty(()))
        if config.backout:
            self.backout_factor = nn.Parameter(torch.empty(()))
        initialize(self, config)  # in float32, so that a seed gives the same numbers for every dtype
        self.to(wide_dtype(self.dtype))
        if self.dtype == torch.bfloat16:
            self.embedding.to(self.dtype)
            self.value_embeddings.to(self.dtype)
        # Tables for ten times the training length are kept; later positions are computed when needed.
        cos_TC, sin_TC = self._rotary_tables(0, 10 * context.max_seq_len)
        self.register_buffer("cos_TC", cos_TC, persistent=False)
        self.register_buffer("sin_TC", sin_TC, persistent=False)
        self._compiled_block: Callable[..., Tensor] | None = None
        self._compiled, self._recompute = False, False
        self._weights: tuple[nn.Parameter, ...] | None = None

    def hidden(self, ids_BT: Tensor, cache: Cache | None = None) -> Tensor:
        assert cache is None or isinstance(cache, KVCache | RowsView), "a cache comes from new_cache or new_row_cache"
        with no_autocast(ids_BT.device):
            before_B1 = cache.append(ids_BT) if cache is not None else None
            x_BTD = self._embed(ids_BT, before_B1)
            past, T = cache.past if cache is not None else Past(), ids_BT.shape[1]
            training = torch.is_grad_enabled() and cache is None
            maskings = {
                w: make_masking(self.config.attention, w, T, past, training, self.dtype, ids_BT.device)
                for w in set(self.windows)
            }
            decoder = self._decoder() if isinstance(cache, RowsView) and T == 1 else None
            if isinstance(cache, RowsView) and decoder is not None:
                cos, sin = (table.squeeze(-2) for table in self._rotary(past, T))
                x_BD = decode(self, decoder, ids_BT, x_BTD[:, 0], (cos, sin), maskings, cache)
                cache.advance(T)
                return x_BD[:, None]
            fp8 = self.config.fp8 and training and self.training
            common = Pass(self._rotary(past, T), x_BTD, self.config.norm_eps, self.dtype, fp8)
            run = self._block_runner(training and self.training)
            scalars = self._scalars()
            middle_BTD = x_BTD
            for index, block in enumerate(self.blocks):
                e_BTD = None
                if str(index) in self.value_embeddings:
                    e_BTD = embed(ids_BT, self.value_embeddings[str(index)].weight)
                layer = cache.layer(index) if cache is not None else None
                x_BTD = run(block, x_BTD, e_BTD, scalars[index], common, maskings[self.windows[index]], layer)
                if index == self.config.depth // 2:
                    middle_BTD = x_BTD
            if cache is not None:
                cache.advance(T)
            if self.config.backout:
                x_BTD = (x_BTD - self.backout_factor * middle_BTD).to(x_BTD.dtype)
            return rms_norm(x_BTD, self.config.norm_eps)

    def _decoder(self, only_if_made: bool = False) -> Decoder | None:
        """Packed weights, where they stay as they are for a while."""
        if self._weights is None:
            self._weights = tuple(self.parameters())
        return kept_at_rest(self._make_decoder, self._weights, only_if_made=only_if_made)

    def _make_decoder(self) -> Decoder:
        return make_decoder(self)

    def _embed(self, ids_BT: Tensor, before_B1: Tensor | None) -> Tensor:
        """Input of the first block: the normed and smeared embedding, [B, T, D]."""
        x_BTD = rms_norm(embed(ids_BT, self.embedding.weight), self.config.norm_eps)
        if not self.config.smear:
            return x_BTD
        before_B1D = None
        if before_B1 is not None:
            before_B1D = rms_norm(embed(before_B1.clamp_min(0), self.embedding.weight), self.config.norm_eps)
            before_B1D = before_B1D * (before_B1 >= 0)[..., None]
        return smear(x_BTD, before_B1D, self.smear_gate.weight, self.smear_factor)

    def _scalars(self) -> list[tuple[Tensor, Tensor]] | list[None]:
        if not self.config.residual_scalars:
            return [None] * self.config.depth
        return list(zip(self.residual_scalars.unbind(), self.x0_scalars.unbind(), strict=True))

    def _block_runner(self, training: bool) -> Callable[..., Tensor]:
        run: Callable[..., Tensor] = self._compiled_block if training and self._compiled_block else Block.__call__
        if not (training and self._recompute):
            return run

        def recomputed(*arguments: Any) -> Tensor:
            y: Tensor = checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False)
            return y

        return recomputed

    def _rotary(self, past: Past, T: int) -> tuple[Tensor, Tensor]:
        cos_TC, sin_TC = self.get_buffer("cos_TC"), self.get_buffer("sin_TC")
        start, stop = past.shortest, past.longest + T
        if stop > len(cos_TC):
            # The tables don't grow: training would have to be compiled again.
            cos_TC, sin_TC = (t.to(cos_TC.device) for t in self._rotary_tables(start, stop))
        else:
            cos_TC, sin_TC = cos_TC[start:stop], sin_TC[start:stop]
        if past.starts_B is None:
            return cos_TC, sin_TC
        positions_BT = (past.starts_B - start)[:, None] + torch.arange(T, device=cos_TC.device)
        return cos_TC[positions_BT], sin_TC[positions_BT]

    def _rotary_tables(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        cos_TC, sin_TC = rotary_tables(start, stop, self.shape.head_dim, self.config.rope_base)
        wide = wide_dtype(self.dtype)
        return cos_TC.to(wide), sin_TC.to(wide)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        with no_autocast(hidden_ND.device):
            decoder = self._decoder(only_if_made=True) if len(hidden_ND) <= MAX_DECODED else None
            if decoder is not None:
                return capped_logits(decoder, hidden_ND.to(self.dtype), self.config.softcap, self.vocab_size)
            weight_VD = cast(self.head.weight, self.dtype)[: self.vocab_size]
            cap, z_NV = self.config.softcap, linear(hidden_ND, weight_VD, self.dtype)
            z_NV = z_NV.to(wide_dtype(z_NV.dtype))
            if not cap:
                return z_NV
            return cap * torch.tanh(z_NV / cap) if torch.is_grad_enabled() else z_NV.div_(cap).tanh_().mul_(cap)

    def forward(self, ids_BT: Tensor, targets_BT: Tensor, reduction: Literal["sum", "none"] = "sum") -> Tensor:
        cap = self.config.softcap
        if reduction == "none" or not torch.is_grad_enabled() or not 0 < cap <= MAX_CAP:
            return super().forward(ids_BT, targets_BT, reduction)
        hidden_ND = self.hidden(ids_BT).flatten(0, 1)
        with no_autocast(ids_BT.device):
            weight_VD = self.head.weight[: self.vocab_size]
            fused = self._compiled and hidden_ND.is_cuda
            return softcap_cross_entropy(hidden_ND, weight_VD, targets_BT.flatten(), cap, self.dtype, fused)

    def new_cache(self, batch_size: int, max_tokens: int) -> KVCache:
        weight = self.head.weight
        return KVCache(len(self.blocks), batch_size, self.shape, max_tokens, self.dtype, weight.device)

    def new_row_cache(self, rows: int, max_tokens: int) -> GPTRowCache:
        return GPTRowCache(len(self.blocks), rows, self.shape, max_tokens, self.dtype, self.head.weight.device)

    def checkpoint_activations(self) -> None:
        self._recompute = True

    def compile_training(self, backend: str = "inductor") -> None:
        """Compile the blocks for training: identical blocks once, so that compile time does not grow with depth.

        Evaluation and sampling, whose shapes vary, stay eager, and so do the embeddings, whose compiled gradients would
        not be deterministic. The head is compiled on a GPU only; on a CPU that is not faster.
        """
        self._compiled_block = torch.compile(Block.forward, dynamic=False, backend=backend)
        self._compiled = True

    def parameter_roles(self) -> Mapping[str, str]:
        special = {
            "embedding.weight": "embedding",
            "head.weight": "head",
            "residual_scalars": "scalar.residual",
            "x0_scalars": "scalar.x0",
            "smear_gate.weight": "scalar.smear",
            "smear_factor": "scalar.smear",
            "backout_factor": "scalar.smear",
        }
        roles = {name: special.get(name, "matrix") for name, _ in self.named_parameters()}
        return {n: "embedding.value" if n.startswith("value_embeddings.") else role for n, role in roles.items()}

    def flops_per_token(self, max_seq_len: int) -> float:
        """FLOPs per token: 6 per parameter of a matrix (forward 2, backward 4), and for attention per layer 12 x heads
        x head size x tokens in the window. Embeddings and scalars are not counted."""
        counts = self.parameter_counts()
        attended = sum(min(w, max_seq_len) if w is not None else max_seq_len for w in self.windows)
        attention = 12 * self.shape.heads * self.shape.head_dim * attended
        return 6.0 * (counts["matrix"] + counts["head"]) + attention

    def reference_counts(self) -> Mapping[str, int]:
        """Parameter counts of the model of depth 12 with the same vocabulary and automatic heads."""
        config = attrs.evolve(self.config, depth=12, n_head="auto", n_kv_head="auto")
        with torch.device("meta"):
            return GPT(config, attrs.evolve(self.context, max_seq_len=1)).parameter_counts()

    def resolved_options(self) -> Mapping[str, Resolved]:
        length, shape, config = self.context.max_seq_len, self.shape, self.config
        found = {
            "n_head": Resolved(shape.heads, f"ceil(width {shape.width} / head_dim {config.head_dim})"),
            "n_kv_head": Resolved(shape.kv_heads, "as many as n_head"),
            "vocab_size": Resolved(self.vocab_size, "the tokenizer's"),
        }
        if "S" in config.window_pattern:
            found["window"] = Resolved(
                auto_window(length), f"max_seq_len {length} / 4, rounded up to a multiple of 128"
            )
        return {name: resolved for name, resolved in found.items() if getattr(config, name) == "auto"}

    def unsupported(self) -> Mapping[str, str]:
        device, problems = self.context.device, {}
        if self.config.fp8 and (problem := fp8_problem(device)):
            problems["fp8"] = f"{problem}: set it to false"
        if self.config.attention == "flash3" and (problem := flash3_problem(device, self.dtype)):
            problems["attention"] = f'"flash3" is not available: {problem}; set it to "auto"'
        if self.config.attention == "flex" and device.type != "cuda":
            problems["attention"] = '"flex" trains on CUDA devices only: set it to "auto"'
        return problems

    def describe(self) -> Mapping[str, str | int]:
        width, asked = f"{self.shape.width:,}", self.config.depth * self.config.aspect_ratio
        if self.shape.width != asked:
            width += f" (rounded up from {asked:,}, so that the heads divide it)"
        shape = self.shape
        rows: dict[str, str | int] = {"layers": self.config.depth, "width": width, "heads": shape.heads}
        rows["kv heads"] = shape.kv_heads
        rows["attention"] = "; ".join(self._describe_attention())
        return rows

    def _describe_attention(self) -> list[str]:
        lines, length = [], self.context.max_seq_len
        for window in sorted(set(self.windows), key=lambda w: w is None):
            layers = self.windows.count(window)
            seen = None if window is None or length - 1 <= window else window
            backend, why = choose_backend(self.config.attention, self.context.device, self.dtype, length, seen)
            reach = (
                f"{layers} of {len(self.windows)} layers attend to {window} earlier tokens: "
                if window is not None
                else ""
            )
            lines.append(f"{reach}{backend} ({why})")
        return lines


def build(config: GPTConfig, context: ModelContext) -> GPT:
    """Build the model.

    Raises:
        ConfigError: when the vocabulary is smaller than the tokenizer's.
    """
    if config.vocab_size != "auto" and config.vocab_size < context.vocab_size:
        raise ConfigError(
            f"{config.vocab_size} is smaller than the tokenizer's {context.vocab_size}: "
            f'set it to at least {context.vocab_size}, or to "auto"',
            key="vocab_size",
        )
    return GPT(config, context)
