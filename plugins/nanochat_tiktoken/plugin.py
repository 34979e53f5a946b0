"""Registers the tokenizer ``tiktoken``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanochat_core import hookimpl
from nanochat_tiktoken.config import TiktokenConfig

if TYPE_CHECKING:
    from nanochat_core import Registrar


@hookimpl
def nanochat_register_tokenizers(registry: Registrar) -> None:
    registry.add(
        "tiktoken",
        config=TiktokenConfig,
        factory="nanochat_tiktoken.tokenizer:build",
        from_name="nanochat_tiktoken.tokenizer:from_name",
        summary="a published encoding of tiktoken (gpt2, cl100k_base, ...), or a file of merges",
        requires=("tiktoken",),
        install="pip install tiktoken",
    )
