"""Options of the model ``gpt``, and the shape they give."""

from math import ceil
from typing import Literal

import attrs

from nanochat_core import above, at_least, option


@attrs.frozen
class GPTConfig:
    depth: int = option(20, "number of blocks; sets the width too", validator=at_least(1))
    aspect_ratio: int = option(64, "width for each unit of depth", validator=at_least(1))
    head_dim: int = option(
        128, "target size of an attention head; heads = ceil(width / head_dim)", validator=at_least(2)
    )
    n_head: int | Literal["auto"] = option("auto", 'query heads; "auto": ceil(width / head_dim)', validator=at_least(1))
    n_kv_head: int | Literal["auto"] = option(
        "auto", 'key and value heads, a divisor of n_head; "auto": as many as n_head', validator=at_least(1)
    )
    vocab_size: int | Literal["auto"] = option(
        "auto", "tokens the model knows, at least the tokenizer's; \"auto\": the tokenizer's", validator=at_least(1)
    )
    softcap: float = option(15.0, "logits z become softcap x tanh(z / softcap); 0 is off", validator=at_least(0))
    rope_base: float = option(10000.0, "base of the rotary frequencies", validator=above(0))
    norm_eps: float = option(1e-6, "added to the mean square in every RMSNorm", validator=at_least(0))

    def __attrs_post_init__(self) -> None:
        self.shape()  # so that a contradiction is found when the file is read

    def shape(self) -> "Shape":
        """Width and heads.

        Raises:
            ValueError: when the key and value heads don't divide the query heads.
        """
        width = self.depth * self.aspect_ratio
        heads = ceil(width / self.head_dim) if self.n_head == "auto" else self.n_head
        kv_heads = heads if self.n_kv_head == "auto" else self.n_kv_head
        if heads % kv_heads:
            divisors = ", ".join(str(d) for d in range(1, heads + 1) if heads % d == 0)
            raise ValueError(f"n_kv_head must divide the {heads} query heads (one of {divisors}), not {kv_heads}")
        # Heads of one even size, since rotary positions turn pairs.
        if width % heads or (width // heads) % 2:
            width = ceil(width / (2 * heads)) * 2 * heads
        return Shape(width=width, heads=heads, kv_heads=kv_heads, head_dim=width // heads)


@attrs.frozen
class Shape:
    width: int
    heads: int
    kv_heads: int
    head_dim: int
