"""Registers the tokenizer ``bpe``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanochat_bpe.config import BPEConfig
from nanochat_core import hookimpl

if TYPE_CHECKING:
    from nanochat_core import Registrar


@hookimpl
def nanochat_register_tokenizers(registry: Registrar) -> None:
    registry.add(
        "bpe",
        config=BPEConfig,
        factory="nanochat_bpe.tokenizer:build",
        summary="byte-level BPE, trained on the training documents",
        requires=("rustbpe", "tiktoken"),
        install="pip install rustbpe tiktoken",
    )
