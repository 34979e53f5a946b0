"""Registers the model ``hf`` and the tokenizer ``hf``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanochat_core import hookimpl
from nanochat_hf.config import HFConfig

if TYPE_CHECKING:
    from nanochat_core import Registrar

INSTALL = "pip install 'nanochat-core[hf]'"


@hookimpl
def nanochat_register_models(registry: Registrar) -> None:
    registry.add(
        "hf",
        config=HFConfig,
        factory="nanochat_hf.model:build",
        summary="a causal language model of transformers, for nanochat eval hf:PATH",
        requires=["transformers"],
        install=INSTALL,
    )


@hookimpl
def nanochat_register_tokenizers(registry: Registrar) -> None:
    registry.add(
        "hf",
        config=HFConfig,
        factory="nanochat_hf.tokenizer:build",
        summary="the tokenizer of a model of transformers, for nanochat eval hf:PATH",
        requires=["transformers"],
        install=INSTALL,
    )
