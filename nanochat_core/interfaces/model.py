"""The Model interface.

Names of tensors end in their shape: B sequences, T positions, D hidden size, V vocabulary, N any number of positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import attrs
import torch
from torch import Tensor, nn

from nanochat_core.files import shorten
from nanochat_core.interfaces.loss import cross_entropy
from nanochat_core.interfaces.types import Resolved


@attrs.frozen
class ModelContext:
    """The context that the factory of a model receives.

    A model is built on the CPU, with torch's default generator seeded, and then moved to ``device``. For planning it is
    built on the meta device.

    Args:
        vocab_size: number of tokens of the tokenizer.
        max_seq_len: longest training row T, in tokens.
        device: device on which the model will run.
        dtype: dtype of matrix products (float32, bfloat16 or float16). Forward passes run under ``torch.autocast`` with
            it; a model that casts by itself disables autocast inside.
    """

    vocab_size: int
    max_seq_len: int
    device: torch.device
    dtype: torch.dtype


class Cache(Protocol):
    """The state of a model between consecutive chunks of a batch of sequences, such as a KV cache.

    ``length`` may be settable. Setting it to a smaller number forgets the positions after it, which allows the scoring
    of choices to compute their common beginning once.
    """

    @property
    def length(self) -> int:
        """Number of positions that the cache holds."""


class RowCache(Protocol):
    """The state of sequences that advance independently of each other, each in a row of its own.

    Rows are freed and used again, so nothing of an earlier sequence may show in a later one.
    """

    @property
    def lengths(self) -> Sequence[int]:
        """Number of positions that each row holds."""

    @property
    def max_tokens(self) -> int:
        """Number of positions that a row can hold."""

    def rows(self, start: int, stop: int, counts: Sequence[int] | None = None) -> Cache:
        """Return the cache argument with which one call of ``hidden`` continues rows ``start`` to ``stop``, in order.

        Args:
            counts: number of tokens that each row reads, at most T; the others, on the right, are padding, whose states
                mean nothing. A row that reads none is as before. None: every row reads T tokens.
        """

    def save(self, row: int, length: int) -> Any:
        """Return a copy of the first ``length`` positions of a row, which later changes of the row don't reach."""

    def load(self, row: int, saved: Any, length: int) -> None:
        """Replace a row by the first ``length`` positions of what ``save`` returned.

        That was a row of this cache, or of another one of the same model, perhaps with more rows or tokens.
        """

    def clear(self, row: int) -> None:
        """Free a row: it holds no positions."""


class Model(nn.Module, ABC):
    """A causal language model in two parts, hidden states and head, from which the core computes losses and samples."""

    vocab_size: int  # V, at least that of the tokenizer; ids out of range raise
    hidden_size: int  # D, the size of the states that ``hidden`` returns
    max_positions: int | None = None  # maximum number of positions of a sequence; None: no limit

    @abstractmethod
    def hidden(self, ids_BT: Tensor, cache: Cache | None = None) -> Tensor:
        """Return the states before the head, [B, T, D], for int64 ids [B, T].

        With a cache, ``ids_BT`` continue the sequences in it, and it grows by T positions.
        """

    @abstractmethod
    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Return the logits, float32 [N, V], of states [N, D].

        A model whose ``hidden`` computes logits has D = V, and returns its argument here.
        """

    def forward(self, ids_BT: Tensor, targets_BT: Tensor, reduction: Literal["sum", "none"] = "sum") -> Tensor:
        """Return the cross-entropy of the targets in nats, as float32: the sum, (), or [B, T] with reduction "none".

        Targets that are ``IGNORED`` (-1) give 0.
        """
        training = self.training and torch.is_grad_enabled()
        hidden = self._compiled_hidden if training and self._compiled_hidden is not None else self.hidden
        return cross_entropy(self, hidden(ids_BT), targets_BT, reduction)

    _compiled_hidden: Callable[[Tensor], Tensor] | None = None

    def compile_training(self) -> None:
        """Compile the computation of training. Evaluation and sampling, whose shapes vary, are not compiled."""
        self._compiled_hidden = torch.compile(self.hidden, dynamic=False)

    def new_cache(self, batch_size: int, max_tokens: int) -> Cache | None:
        """Return an empty cache for ``batch_size`` sequences of up to ``max_tokens`` tokens.

        None: the model has no cache, and sampling computes the whole sequence again for every token.
        """
        return None

    def new_row_cache(self, rows: int, max_tokens: int) -> RowCache | None:
        """Return an empty cache of ``rows`` rows of up to ``max_tokens`` tokens each, for the generation of many texts.

        None: the model has none. Then only sequences of equal length are computed together, with ``new_cache``, or
        without any cache.
        """
        return None

    def checkpoint_activations(self) -> None:
        """Enable activation checkpointing: keep only the input of each block for the backward pass, and recompute the
        rest there, as ``torch.utils.checkpoint`` does with ``use_reentrant=False``. Called once, before
        ``compile_training``.

        Raises:
            NotImplementedError: when the model does not support it.
        """
        raise NotImplementedError

    def parameter_roles(self) -> Mapping[str, str]:
        """Return the role of each parameter, by name.

        Every optimizer knows ``matrix`` (2-D weight inside a block), ``embedding``, ``head`` and ``scalar`` (anything
        else). A dot refines a role, as in ``scalar.residual``: an optimizer that doesn't know the refined role uses its
        ``base_role``. Default: by shape and module type, see ``default_roles``.
        """
        return default_roles(self)

    def parameter_counts(self) -> Mapping[str, int]:
        """Return the number of parameters by base role, and their sum as ``total``."""
        roles, counts = self.parameter_roles(), dict[str, int]()
        for name, parameter in self.named_parameters():
            role = base_role(roles[name])
            counts[role] = counts.get(role, 0) + parameter.numel()
        return {**counts, "total": sum(counts.values())}

    def flops_per_token(self, max_seq_len: int) -> float:
        """Return the FLOPs per token of a forward and backward pass. Default: 6 per parameter, embeddings excluded."""
        counts = self.parameter_counts()
        return 6.0 * (counts["total"] - counts.get("embedding", 0))

    def reference_counts(self) -> Mapping[str, int] | None:
        """Return the ``parameter_counts`` of the reference model of the family: the one whose best batch size is 2^19
        tokens, often that of depth 12. None: there is none, and ``total_batch_size = "auto"`` is an error."""
        return None

    def resolved_options(self) -> Mapping[str, Resolved]:
        """Return the values of options that are "auto", by option name."""
        return {}

    def unsupported(self) -> Mapping[str, str]:
        """Return options with which training is not possible on the device that the model was built for: option name to
        the reason and the remedy. A run is refused, whereas a plan only reports them."""
        return {}

    def describe(self) -> Mapping[str, str | int]:
        """Return lines about the model for the plan: name to value, such as ``layers`` and ``width``."""
        return {}


def base_role(role: str) -> str:
    """Return a role without its refinement: ``scalar`` for ``scalar.residual``, ``matrix`` for ``matrix``."""
    return role.partition(".")[0]


def default_roles(model: nn.Module) -> dict[str, str]:
    """Return roles for a model that declares none, by parameter name.

    The weight of an ``nn.Embedding`` is ``embedding``, even if the head shares it. Otherwise the last 2-D parameter is
    ``head``, other 2-D parameters are ``matrix``, and all others are ``scalar``.
    """
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


def description_problems(model: Model, max_seq_len: int) -> Iterator[str]:
    """Yield the rules that a model breaks by what it says about itself, without computing anything."""
    for attribute in ("vocab_size", "hidden_size"):
        value = getattr(model, attribute, None)
        if not _is_count(value):
            yield f"it must set self.{attribute} to an int of at least 1, not {shorten(value)}"
    if model.max_positions is not None and not _is_count(model.max_positions):
        yield f"max_positions must be None or an int of at least 1, not {shorten(model.max_positions)}"
    named = dict(model.named_parameters())
    if not any(parameter.requires_grad for parameter in named.values()):
        yield "it has no trainable parameters, so that there is nothing to train"
        return
    roles = model.parameter_roles()
    if not isinstance(roles, Mapping) or not all(isinstance(role, str) and role for role in roles.values()):
        yield f"parameter_roles() must map names of parameters to roles, not {shorten(roles)}"
        return
    if unknown := set(named) - set(roles):
        yield f"parameter_roles() lacks {', '.join(sorted(unknown))}"
        return
    counts, reference = model.parameter_counts(), model.reference_counts()
    for what, given in (("parameter_counts()", counts), ("reference_counts()", reference)):
        if what[0] == "r" and given is None:
            continue
        is_counts = isinstance(given, Mapping) and all(_is_count(n) or n == 0 for n in given.values())
        if not is_counts or not given or not _is_count(given.get("total")):
            yield f"{what} must map roles to numbers of parameters, with their sum as total, not {shorten(given)}"
    flops = model.flops_per_token(max_seq_len)
    is_number = isinstance(flops, int | float) and not isinstance(flops, bool)
    if not is_number or not 0 < flops < 1e30:
        yield f"flops_per_token() must be a finite number greater than 0, not {shorten(flops)}"


def output_problems(model: Model) -> Iterator[str]:
    """Yield the rules that a model breaks by what it computes of two tokens, on the device of its parameters."""
    with torch.enable_grad():
        hidden_BTD = model.hidden(torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device))
        wanted = (1, 2, model.hidden_size)
        if not isinstance(hidden_BTD, Tensor) or hidden_BTD.shape != wanted:
            yield f"hidden must return states [B, T, D] = {list(wanted)}, not {_shown(hidden_BTD)}"
            return
        logits_NV = model.logits(hidden_BTD.flatten(0, 1))
    is_right = isinstance(logits_NV, Tensor) and logits_NV.shape == (2, model.vocab_size)
    if not is_right or logits_NV.dtype != torch.float32:
        yield f"logits must return float32 [N, V] = [2, {model.vocab_size}], not {_shown(logits_NV)}"
    elif not logits_NV.requires_grad:
        yield "its logits don't depend on its parameters in a way that can be differentiated: it would learn nothing"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _shown(value: object) -> str:
    if not isinstance(value, Tensor):
        return shorten(value)
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
