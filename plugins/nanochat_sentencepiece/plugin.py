"""Registers the tokenizer ``sentencepiece``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanochat_core import hookimpl
from nanochat_sentencepiece.config import SentencePieceConfig

if TYPE_CHECKING:
    from nanochat_core import Registrar


@hookimpl
def nanochat_register_tokenizers(registry: Registrar) -> None:
    registry.add(
        "sentencepiece",
        config=SentencePieceConfig,
        factory="nanochat_sentencepiece.tokenizer:build",
        summary="sentencepiece, trained on the training documents, or a .model file",
        requires=("sentencepiece",),
        install="pip install sentencepiece",
    )
