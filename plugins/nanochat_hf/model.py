"""The model ``hf``: a causal language model of transformers as a ``Model``."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from nanochat_core import Cache, ConfigError, Model, ModelContext
from nanochat_hf.config import HFConfig

TOLERANCE = 1e-3


class HFCache:
    """A key-value cache of transformers. ``length`` can be lowered if that cache can be cropped."""

    def __init__(self) -> None:
        self.theirs = transformers.DynamicCache()

    @property
    def length(self) -> int:
        return int(self.theirs.get_seq_length())

    @length.setter
    def length(self, length: int) -> None:
        surplus = self.length - length
        try:
            if surplus > 0:
                self.theirs.crop(-surplus)  # the meaning of positive numbers differs between versions
        except Exception as error:
            raise AttributeError(f"this cache can't be shortened: {error}") from error


class HFModel(Model):
    """A causal language model of transformers.

    Its base model gives the hidden states and its head the logits, if both together give the model's own logits;
    otherwise the logits take the place of the hidden states.

    Args:
        theirs: the model of transformers.
    """

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.theirs = theirs
        text = theirs.config.get_text_config()
        self.vocab_size = int(theirs.get_output_embeddings().weight.shape[0])
        self.max_positions = getattr(text, "max_position_embeddings", None)
        self.split = self._can_be_split()
        self.hidden_size = int(text.hidden_size) if self.split else self.vocab_size

    @torch.no_grad()
    def _can_be_split(self) -> bool:
        """Whether base model and head give the model's logits. (Some models scale or cap logits after the head.)"""
        ids_BT = torch.arange(8, device=self.theirs.device)[None] % self.vocab_size
        head = self.theirs.get_output_embeddings()
        ours = head(self.theirs.base_model(input_ids=ids_BT).last_hidden_state)
        theirs = self.theirs(input_ids=ids_BT).logits
        return ours.shape == theirs.shape and bool(torch.allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE))

    def hidden(self, ids_BT: Tensor, cache: Cache | None = None) -> Tensor:
        assert cache is None or isinstance(cache, HFCache), "a cache comes from new_cache"
        options = {"past_key_values": cache.theirs, "use_cache": True} if cache is not None else {"use_cache": False}
        if self.split:
            states: Tensor = self.theirs.base_model(input_ids=ids_BT, **options).last_hidden_state
            return states
        logits: Tensor = self.theirs(input_ids=ids_BT, **options).logits
        return logits

    def logits(self, hidden_ND: Tensor) -> Tensor:
        logits: Tensor = self.theirs.get_output_embeddings()(hidden_ND) if self.split else hidden_ND
        return logits.float()

    def new_cache(self, batch_size: int, max_tokens: int) -> HFCache:
        return HFCache()


def build(config: HFConfig, context: ModelContext) -> HFModel:
    """Load the model. Weights are float32; autocast computes in the run's dtype.

    Raises:
        ConfigError: when transformers can't load it.
    """
    try:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            config.path, dtype=torch.float32, gguf_file=config.gguf_file, revision=config.revision or "main"
        )
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"transformers can't load {config.path}: {error}", key="path") from error
    return HFModel(theirs.eval())
