"""Registers the tokenizer ``huggingface``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanochat_core import hookimpl
from nanochat_huggingface.config import HuggingFaceConfig

if TYPE_CHECKING:
    from nanochat_core import Registrar


@hookimpl
def nanochat_register_tokenizers(registry: Registrar) -> None:
    registry.add(
        "huggingface",
        config=HuggingFaceConfig,
        factory="nanochat_huggingface.tokenizer:build",
        summary="a byte-level tokenizer.json, such as those of GPT-2, Llama 3 and Qwen",
        requires=("tokenizers",),
        install="pip install tokenizers",
    )
