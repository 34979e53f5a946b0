"""The six interfaces of nanochat, and the contexts that factories get.

Tensor names carry their shape: B sequences, T positions, D hidden size, V vocabulary, N = any number of positions.
A factory is called as ``factory(config, context)`` with the plugin's typed config and the context of its kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import attrs
import torch
from torch import Tensor, nn

from nanochat_core.interfaces.logger import Logger as Logger
from nanochat_core.interfaces.logger import LoggerContext as LoggerContext
from nanochat_core.interfaces.loss import cross_entropy
from nanochat_core.interfaces.types import Resolved

# ---------------------------------------------------------------------------------------------------- tokenizers


# -------------------------------------------------------------------------------------------------- data sources


# -------------------------------------------------------------------------------------------------------- models


@attrs.frozen
class ModelContext:
    """Facts that the factory of a model gets.

    It is built on the CPU (or on the meta device, to count) with torch's default generator seeded, then moved.

    Args:
        vocab_size: number of tokens of the tokenizer.
        max_seq_len: longest training row T, in tokens.
        device: where it will run.
        dtype: what matrix products should be computed in (float32, bfloat16 or float16). Forward passes run under
            ``torch.autocast`` with it; a model that casts by itself turns that off inside.
    """

    vocab_size: int
    max_seq_len: int
    device: torch.device
    dtype: torch.dtype


class Cache(Protocol):
    """State of a model between chunks of one batch of sequences.

    Where ``length`` can be set to a smaller number, the positions from there on are forgotten, and what several
    choices begin with is computed once when they are scored.
    """

    @property
    def length(self) -> int:
        """Number of positions already read."""


class Model(nn.Module, ABC):
    """A causal language model in two parts, so that losses, scores and samples are written once, in the core."""

    vocab_size: int  # V, at least the tokenizer's; ids outside raise
    hidden_size: int  # D of ``hidden``
    max_positions: int | None = None  # most positions it can read; None: any number

    @abstractmethod
    def hidden(self, ids_BT: Tensor, cache: Cache | None = None) -> Tensor:
        """[B, T, D] states before the head. With a cache, ``ids_BT`` continue what it holds, and it grows by T."""

    @abstractmethod
    def logits(self, hidden_ND: Tensor) -> Tensor:
        """float32 [N, V]. A model that only has logits sets D = V and returns its input."""

    def forward(self, ids_BT: Tensor, targets_BT: Tensor, reduction: Literal["sum", "none"] = "sum") -> Tensor:
        """Cross-entropy of the targets, in nats: float32, () summed or [B, T]; ignored targets give 0."""
        training = self.training and torch.is_grad_enabled()
        hidden = self._compiled_hidden if training and self._compiled_hidden is not None else self.hidden
        return cross_entropy(self, hidden(ids_BT), targets_BT, reduction)

    _compiled_hidden: Callable[[Tensor], Tensor] | None = None

    def compile_training(self) -> None:
        """Compile what training runs through; evaluation and sampling, whose shapes vary, stay as they are."""
        self._compiled_hidden = torch.compile(self.hidden, dynamic=False)

    def new_cache(self, batch_size: int, max_tokens: int) -> Cache | None:
        """An empty cache, or None for a model without: then the prefix is computed again for every token."""
        return None

    def checkpoint_activations(self) -> None:
        """Keep only what enters each block for the backward pass, and compute the rest again there, as
        ``torch.utils.checkpoint`` does with ``use_reentrant=False``. Called once, before ``compile_training``.

        Raises:
            NotImplementedError: when the model can't.
        """
        raise NotImplementedError

    def parameter_roles(self) -> Mapping[str, str]:
        """Parameter name to role. Roles that optimizers know: ``matrix`` (2-D weight inside a block), ``embedding``,
        ``head``, ``scalar`` (anything else). A dot refines a role, as in ``scalar.residual``: an optimizer that
        doesn't know the whole of it goes by its ``base_role``. Default: by shape and module type, see
        ``default_roles``."""
        return default_roles(self)

    def parameter_counts(self) -> Mapping[str, int]:
        """Number of parameters by base role, and their sum as ``total``."""
        roles, counts = self.parameter_roles(), dict[str, int]()
        for name, parameter in self.named_parameters():
            role = base_role(roles[name])
            counts[role] = counts.get(role, 0) + parameter.numel()
        return {**counts, "total": sum(counts.values())}

    def flops_per_token(self, max_seq_len: int) -> float:
        """FLOPs per token of one forward and backward pass. Default: 6 per parameter, embeddings excluded."""
        counts = self.parameter_counts()
        return 6.0 * (counts["total"] - counts.get("embedding", 0))

    def reference_counts(self) -> Mapping[str, int] | None:
        """``parameter_counts`` of the family's reference model, the one whose best batch is 2^19 tokens (often the
        one of depth 12). None: ``total_batch_size = "auto"`` is refused."""
        return None

    def resolved_options(self) -> Mapping[str, Resolved]:
        """The value of each option left to "auto", by option name."""
        return {}

    def unsupported(self) -> Mapping[str, str]:
        """Options that can't be trained with on the device the model was built for: option name to why, and what to do.
        A run is refused; a plan for other hardware goes on."""
        return {}

    def describe(self) -> Mapping[str, str | int]:
        """Lines of the plan about the model: name to value, such as ``layers`` and ``width``."""
        return {}


def base_role(role: str) -> str:
    """``scalar`` of ``scalar.residual``; ``matrix`` of ``matrix``."""
    return role.partition(".")[0]


def default_roles(model: nn.Module) -> dict[str, str]:
    """Roles for a model that declares none: what an ``nn.Embedding`` holds is ``embedding``, even if it is the head
    too; else the last 2-D parameter is ``head``; other 2-D parameters are ``matrix``, everything else ``scalar``."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    others = [m for m in model.modules() if not isinstance(m, nn.Embedding)]
    tied = any(id(p) in embeddings for m in others for p in m.parameters(recurse=False))
    named = list(model.named_parameters())
    matrices = [name for name, p in named if p.ndim == 2 and id(p) not in embeddings]
    roles = {}
    for name, parameter in named:
        if id(parameter) in embeddings:
            roles[name] = "embedding"
        elif parameter.ndim == 2:
            roles[name] = "head" if name == matrices[-1] and not tied else "matrix"
        else:
            roles[name] = "scalar"
    return roles


# ---------------------------------------------------------------------------------------------------- optimizers


# ---------------------------------------------------------------------------------------------------- evaluators
