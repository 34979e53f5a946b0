"""Options of the model ``gpt``, and the shape that they determine."""

from math import ceil
from typing import Literal

import attrs

from nanochat_core import above, at_least, first_few, one_of, option

SMEAR_CHANNELS, GATE_CHANNELS = 24, 12  # of the residual stream, inputs of the gates
INITS = ("classic", "modern")
ROUNDINGS = ("heads", "head_dim")
BACKENDS = ("auto", "matrix", "sdpa", "flex", "flash3")


@attrs.frozen
class GPTConfig:
    """Options of ``gpt``."""

    depth: int = option(20, "number of blocks; determines the width too", validator=at_least(1, 256))
    aspect_ratio: int = option(64, "width per unit of depth", validator=at_least(1, 2**14))
    head_dim: int = option(
        128, "target size of an attention head; heads = ceil(width / head_dim)", validator=at_least(2, 2**14)
    )
    width_rounding: Literal["heads", "head_dim"] = option(
        "heads",
        "round the width up to a multiple of heads x 2, so that odd depths have even heads; or of head_dim, so that "
        "every head has exactly that size",
        validator=one_of(*ROUNDINGS),
    )
    n_head: int | Literal["auto"] = option(
        "auto", 'query heads; "auto": ceil(width / head_dim)', validator=at_least(1, 2**16)
    )
    n_kv_head: int | Literal["auto"] = option(
        "auto", 'key and value heads, a divisor of n_head; "auto": as many as n_head', validator=at_least(1, 2**16)
    )
    vocab_size: int | Literal["auto"] = option(
        "auto",
        'number of tokens of the model, at least that of the tokenizer; "auto": that of the tokenizer',
        validator=at_least(1, 2**24),
    )
    softcap: float = option(15.0, "logits z become softcap x tanh(z / softcap); 0 is off", validator=at_least(0, 1e6))
    rope_base: float = option(10000.0, "base of the rotary frequencies", validator=at_least(1, 1e12))
    norm_eps: float = option(1e-6, "added to the mean square in every RMSNorm", validator=at_least(0, 1))
    qk_scale: float = option(1.0, "factor on queries and keys after their norm", validator=above(0, 1e6))
    window_pattern: str = option(
        "L",
        "repeated over the layers: L attends to all earlier tokens, S to as many as window; the last layer is always L",
    )
    window: int | Literal["auto"] = option(
        "auto",
        'earlier tokens that an S layer attends to; "auto": max_seq_len / 4, rounded up to a multiple of 128',
        validator=at_least(1, 2**24),
    )
    value_embeddings: bool = option(
        False, "in every second layer, counted back from the last, a gated embedding of the token is added to its value"
    )
    residual_scalars: bool = option(
        False, "before each block x = r x + s x0, with trained r and s per layer, and x0 the embedded token"
    )
    smear: bool = option(False, "a gated part of the previous embedded token is added to each")
    backout: bool = option(False, "subtract a trained multiple of the middle block's output before the last norm")
    init: Literal["classic", "modern"] = option(
        "classic",
        "classic: normal matrices, head 0; modern: uniform matrices, a smaller MLP, head normal 0.001, embedding 0.8",
        validator=one_of(*INITS),
    )
    fp8: bool = option(
        False,
        "in training, matrix products of the blocks in float8 with a scale for each tensor; needs Hopper or newer",
        unverified="its arithmetic is tested on CPUs, it never ran on a GPU",
    )
    attention: Literal["auto", "matrix", "sdpa", "flex", "flash3"] = option(
        "auto",
        "backend of attention in training: the whole T x T matrix, torch's scaled_dot_product_attention, "
        'FlexAttention, or FlashAttention-3; "auto": the fastest that is correct here (a run prints it)',
        validator=one_of(*BACKENDS),
        on_resume="warn",
        unverified="flex and flash3 never trained on a GPU",
    )

    def __attrs_post_init__(self) -> None:
        if not self.window_pattern or set(self.window_pattern) - {"S", "L"}:
            raise ValueError(f'window_pattern must consist of S and L, such as "SSSL", not "{self.window_pattern}"')
        if self.window != "auto" and "S" not in self.window_pattern:
            raise ValueError(
                f'window must be "auto": window_pattern "{self.window_pattern}" has no layer with a window'
            )
        shape = self.shape()  # so that contradictions are found when the file is read
        if self.smear and shape.width < SMEAR_CHANNELS:
            raise ValueError(
                f"smear must be false: its gate reads {SMEAR_CHANNELS} channels, the width is {shape.width}"
            )
        if self.value_embeddings and shape.width < GATE_CHANNELS:
            raise ValueError(
                f"value_embeddings must be false: their gates read {GATE_CHANNELS} channels, the width is {shape.width}"
            )
        if self.fp8 and (shape.width % 16 or shape.kv_heads * shape.head_dim % 16):
            raise ValueError(f"fp8 must be false: it needs a width that is a multiple of 16, not {shape.width}")

    def shape(self) -> "Shape":
        """Width, heads and their size.

        Raises:
            ValueError: when the key and value heads don't divide the query heads.
        """
        width = self.depth * self.aspect_ratio
        natural = ceil(width / self.head_dim)
        heads = natural if self.n_head == "auto" else self.n_head
        kv_heads = heads if self.n_kv_head == "auto" else self.n_kv_head
        if heads % kv_heads:
            divisors = first_few([str(d) for d in range(1, heads + 1) if heads % d == 0], 20)
            raise ValueError(f"n_kv_head must divide the {heads} query heads (one of {divisors}), not {kv_heads}")
        if self.width_rounding == "head_dim":
            if heads != natural:
                raise ValueError(f'n_head must be "auto" or {natural} with width_rounding = "head_dim", not {heads}')
            if self.head_dim % 2:
                raise ValueError(
                    f"head_dim must be even (rotary positions rotate pairs of channels), not {self.head_dim}"
                )
            width = heads * self.head_dim
        elif width % heads or (width // heads) % 2:  # rotary positions rotate pairs of channels
            width = ceil(width / (2 * heads)) * 2 * heads
        return Shape(width=width, heads=heads, kv_heads=kv_heads, head_dim=width // heads)

    def windows(self, max_seq_len: int) -> "tuple[int | None, ...]":
        """Number of earlier tokens that each layer attends to; None: all."""
        window = auto_window(max_seq_len) if self.window == "auto" else self.window
        tiled = [self.window_pattern[layer % len(self.window_pattern)] for layer in range(self.depth - 1)]
        return (*(window if kind == "S" else None for kind in tiled), None)

    def has_value_embedding(self, layer: int) -> bool:
        return self.value_embeddings and (self.depth - 1 - layer) % 2 == 0


def auto_window(max_seq_len: int) -> int:
    return ceil(max_seq_len / 4 / 128) * 128


@attrs.frozen
class Shape:
    """Width of the model, numbers of heads and their size."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
