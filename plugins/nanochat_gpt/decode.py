"""One token of each of many sequences: the same arithmetic as in ``model.py``, in few operations.

A step of few sequences takes as long as reading the weights and starting its operations. So weights are packed once, in
the order in which the processor's matrix product reads them, and operations are merged.

Shapes: B sequences, D width, S = H + 2 K query, key and value heads of size C.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_core import wide_dtype
from nanochat_gpt.attention import Masking, attend
from nanochat_gpt.cache import RowsView

if TYPE_CHECKING:
    from nanochat_gpt.model import GPT

Product = Callable[..., Tensor]


class DecodeBlock(NamedTuple):
    """The products of a block, each x W^T, and its scalars r and s."""

    qkv: Product
    output: Product
    up: Product
    down: Product
    mix: tuple[float, float] | None


class Decoder(NamedTuple):
    """What is made of the weights once, for many steps."""

    blocks: list[DecodeBlock]
    head: Product
    backout: float
    eps: Tensor  # added to the mean square in every RMSNorm


def make_decoder(model: GPT) -> Decoder:
    """Pack the weights of a model. They must not change while the result is used."""
    dtype, blocks = model.dtype, []
    mixes: list[tuple[float, float] | None] = [None] * len(model.blocks)
    if model.config.residual_scalars:
        mixes = list(zip(model.residual_scalars.tolist(), model.x0_scalars.tolist(), strict=True))
    block: Any
    for block, mix in zip(model.blocks, mixes, strict=True):
        attention, mlp = block.attention, block.mlp
        joined = torch.cat([attention.query.weight, attention.key.weight, attention.value.weight])
        weights = (joined, attention.output.weight, mlp.up.weight, mlp.down.weight)
        qkv, output, up, down = (product(weight.to(dtype)) for weight in weights)
        blocks.append(DecodeBlock(qkv, output, up, down, mix))
    backout = model.backout_factor.item() if model.config.backout else 0.0
    eps = torch.tensor(model.config.norm_eps, dtype=wide_dtype(dtype), device=model.head.weight.device)
    return Decoder(blocks, product(model.head.weight.to(dtype)), backout, eps)


def product(weight: Tensor) -> Product:
    """Return ``f(x, activation="none", add=None)``: activation(x W^T) + add, for x [B, I] in the dtype of W [O, I].

    On the CPU the weight is packed for oneDNN, which takes half the time of the unpacked product for few sequences.
    """
    packed = _pack(weight)
    if packed is not None:
        linear = torch.ops.mkldnn._linear_pointwise

        def packed_product(x: Tensor, activation: str = "none", add: Tensor | None = None) -> Tensor:
            y: Tensor
            y = linear(x, packed, None, activation, [], "")
            return y if add is None else y.add_(add)

        return packed_product

    def plain_product(x: Tensor, activation: str = "none", add: Tensor | None = None) -> Tensor:
        y = F.linear(x, weight)
        if activation == "relu":
            y = y.relu_()
        return y if add is None else y.add_(add)

    return plain_product


def _pack(weight: Tensor) -> Tensor | None:
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 32)
    except (AttributeError, RuntimeError):  # another build of torch
        return None
    return packed


def norm(x_BD: Tensor, eps: Tensor) -> Tensor:
    """RMSNorm over the last dimension, in the dtype of x."""
    return torch.mul(x_BD, inverse_rms(x_BD, eps), out=torch.empty_like(x_BD))


def inverse_rms(x: Tensor, eps: Tensor) -> Tensor:
    """(mean(x^2) + eps)^-1/2 over the last dimension, which stays with size 1."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide_dtype(x.dtype))
    return torch.addcmul(eps, length, length, value=1 / x.shape[-1]).rsqrt_()


def decode(
    model: GPT,
    decoder: Decoder,
    ids_B1: Tensor,
    x_BD: Tensor,
    rotary: tuple[Tensor, Tensor],
    maskings: dict[int | None, Masking],
    cache: RowsView,
) -> Tensor:
    """Return the states [B, D] of one token each.

    Args:
        x_BD: the embedded tokens.
        rotary: cosines and sines of their positions, each [C / 2], or [B, C / 2].
        maskings: by window.
    """
    eps, x0_BD, shape = decoder.eps, x_BD, model.shape
    cos, sin = (table.unsqueeze(-2) for table in rotary)
    tables = torch.cat([cos, cos], -1), torch.cat([sin, -sin], -1)
    middle_BD = x_BD
    block: Any
    for index, (block, packed) in enumerate(zip(model.blocks, decoder.blocks, strict=True)):
        if packed.mix is not None:
            x_BD = (x_BD * packed.mix[0]).add_(x0_BD, alpha=packed.mix[1])
        y_BD = norm(x_BD, eps)
        qkv_BSC = _queries_keys_values(model, packed, y_BD, tables, eps)
        if str(index) in model.value_embeddings:
            _add_value_embedding(model, index, block, ids_B1, y_BD, qkv_BSC)
        qkv_SB1C = qkv_BSC.transpose(0, 1).unsqueeze(2)
        q_HB1C, k_KB1C, v_KB1C = qkv_SB1C.split([shape.heads, shape.kv_heads, shape.kv_heads])
        y_HB1C = attend(q_HB1C, k_KB1C, v_KB1C, maskings[model.windows[index]], cache.layer(index))
        x_BD = packed.output(y_HB1C.squeeze(2).transpose(0, 1).reshape(x_BD.shape[0], -1), add=x_BD)
        u_BF = packed.up(norm(x_BD, eps), "relu")
        x_BD = packed.down(u_BF.mul_(u_BF), add=x_BD)
        if index == model.config.depth // 2:
            middle_BD = x_BD
    if model.config.backout:
        x_BD = x_BD.sub(middle_BD, alpha=decoder.backout)
    return norm(x_BD, eps)


def _queries_keys_values(
    model: GPT, packed: DecodeBlock, y_BD: Tensor, tables: tuple[Tensor, Tensor], eps: Tensor
) -> Tensor:
    """Queries, keys and values [B, S, C]; queries and keys are rotated and normed."""
    qkv_BSC = packed.qkv(y_BD).view(len(y_BD), -1, model.shape.head_dim)
    qk_BSC = qkv_BSC[:, : model.shape.heads + model.shape.kv_heads]
    scaled_BSC = qk_BSC * inverse_rms(qk_BSC, eps).mul_(model.config.qk_scale)
    half = model.shape.head_dim // 2
    rotated_BSC = (scaled_BSC * tables[0]).addcmul_(scaled_BSC.roll(half, -1), tables[1])
    qk_BSC.copy_(rotated_BSC)
    return qkv_BSC


def _add_value_embedding(model: GPT, index: int, block: Any, ids_B1: Tensor, y_BD: Tensor, qkv_BSC: Tensor) -> None:
    gate = block.attention.value_gate
    assert gate is not None
    embedding: Any = model.value_embeddings[str(index)]
    e_BKC = F.embedding(ids_B1[:, 0], embedding.weight).view(len(y_BD), model.shape.kv_heads, -1)
    channels = gate.weight.shape[1]
    gate_BK = torch.sigmoid(F.linear(y_BD[:, :channels], gate.weight.to(y_BD.dtype))).mul_(3)
    qkv_BSC[:, -model.shape.kv_heads :] += gate_BK[..., None] * e_BKC


def capped_logits(decoder: Decoder, hidden_BD: Tensor, cap: float, vocab_size: int) -> Tensor:
    """Logits [B, V]: cap tanh(z / cap), or z if the cap is 0."""
    z_BV = decoder.head(hidden_BD)[:, :vocab_size]
    z_BV = z_BV.to(wide_dtype(z_BV.dtype))
    return z_BV.mul_(1 / cap).tanh_().mul_(cap) if cap else z_BV
