"""Registers the tokenizer ``bytes``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanochat_bytes.config import BytesConfig
from nanochat_core import hookimpl

if TYPE_CHECKING:
    from nanochat_core import Registrar


@hookimpl
def nanochat_register_tokenizers(registry: Registrar) -> None:
    registry.add(
        "bytes",
        config=BytesConfig,
        factory="nanochat_bytes.tokenizer:build",
        summary="the 256 bytes of UTF-8 and nine special tokens; nothing to train",
    )
