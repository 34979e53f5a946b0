"""The six interfaces of nanochat, and the contexts that factories get.

Tensor names carry their shape: B sequences, T positions, D hidden size, V vocabulary, N = any number of positions.
A factory is called as ``factory(config, context)`` with the plugin's typed config and the context of its kind.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from nanochat_core.distributed.world import World
from nanochat_core.interfaces.logger import Logger as Logger
from nanochat_core.interfaces.logger import LoggerContext as LoggerContext
from nanochat_core.interfaces.loss import IGNORED as IGNORED
from nanochat_core.interfaces.loss import cross_entropy

Tokens: TypeAlias = npt.NDArray[np.int32]


@attrs.frozen
class Batch:
    """Rows of one micro-batch.

    Args:
        ids_BT: int64 tokens that the model reads.
        targets_BT: int64 tokens that follow them; ``IGNORED`` (-1) where there is nothing to predict.
    """

    ids_BT: Tensor
    targets_BT: Tensor

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        pinned = device.type == "cuda"
        move = (lambda t: t.pin_memory().to(device, non_blocking=True)) if pinned else (lambda t: t.to(device))
        return Batch(move(self.ids_BT), move(self.targets_BT))


# ---------------------------------------------------------------------------------------------------- tokenizers


@attrs.frozen
class TokenizerContext:
    """What a tokenizer may know when it is built.

    Args:
        documents: gives a fresh iterator over the training documents, for a tokenizer that must be trained.
        saved: a directory that ``save`` of the same plugin wrote: load from there instead of training.
    """

    documents: Callable[[], Iterable[str]]
    saved: Path | None = None


class Tokenizer(ABC):
    """Text to tokens and back.

    A tokenizer that is trained has an option ``vocab_size`` and delivers exactly that many tokens, so that a run can
    be planned before the training.
    """

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of tokens, special ones included; ids lie in [0, vocab_size)."""

    @property
    @abstractmethod
    def special_tokens(self) -> Mapping[str, int]:
        """Special tokens by name. Must hold ``<|bos|>``, which leads every document. Never parsed out of text."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Tokens of ``text``, without bos. Special-token strings inside the text are ordinary text."""

    @abstractmethod
    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The exact bytes of ``ids``; special tokens give their name."""

    @abstractmethod
    def token_bytes(self) -> Tokens:
        """[V] int32: number of raw bytes of each token, 0 for special ones."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write all that is needed to load it again, as readable files without pickles, into an existing directory."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest of everything that decides which tokens a text gets."""

    @property
    def bos_id(self) -> int:
        return self.special_tokens["<|bos|>"]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def encode_documents(self, texts: Sequence[str]) -> list[Tokens]:
        """One int32 array a document, each led by bos. Called from a background thread."""
        bos = self.bos_id
        return [np.array([bos, *self.encode(text)], dtype=np.int32) for text in texts]


# -------------------------------------------------------------------------------------------------- data sources

Split = Literal["train", "val"]


@attrs.frozen
class DataContext:
    """What a data source may know when it is built.

    Args:
        cache_dir: an existing directory for what is worth keeping between runs (downloads, extracted text).
    """

    cache_dir: Path


class DataSource(ABC):
    """Documents of a training and a validation split, in a fixed order."""

    @abstractmethod
    def documents(self, split: Split) -> Sequence[str]:
        """The split's documents. Random access by index and by slice (with a step); a list will do.

        Raises:
            DataError: when the data are missing or unreadable.
        """

    def fingerprint(self, split: Split) -> str:
        """Hex digest of the split's content. Default: over every document; override it where that is slow."""
        digest = hashlib.sha256()
        for document in self.documents(split):
            data = document.encode("utf-8", errors="surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()

    def problems(self) -> Sequence[str]:
        """What was skipped so far because it can't be read: a line each, in the order it was met."""
        return ()

    def describe(self) -> Mapping[str, str | int]:
        """What ``nanochat data info`` says of the source: name to value, such as ``files`` and ``bytes``. Fetches no
        documents. Known to the core: ``text_bytes`` (of the training documents) and ``missing`` (files not here yet).
        """
        return {}

    def download(self, workers: int) -> Sequence[str]:
        """Bring everything here that isn't yet, and check it. Returns what is still missing and why, a line each."""
        return ()


# -------------------------------------------------------------------------------------------------------- models


@attrs.frozen
class Resolved:
    """What an "auto" option became: its value, and the formula in words."""

    value: bool | int | float | str
    formula: str


@attrs.frozen
class ModelContext:
    """What a model may know when it is built.

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
        """FLOPs a token of one forward and backward pass. Default: 6 a parameter, embeddings left out."""
        counts = self.parameter_counts()
        return 6.0 * (counts["total"] - counts.get("embedding", 0))

    def reference_counts(self) -> Mapping[str, int] | None:
        """``parameter_counts`` of the family's reference model, the one whose best batch is 2^19 tokens (depth 12 for
        ``gpt``). None: ``total_batch_size = "auto"`` is refused."""
        return None

    def resolved_options(self) -> Mapping[str, Resolved]:
        """What each option left to "auto" became, by option name."""
        return {}

    def unsupported(self) -> Mapping[str, str]:
        """Options that can't be trained with on the device the model was built for: option name to why, and what to do.
        A run is refused; a plan for other hardware goes on."""
        return {}

    def describe(self) -> Mapping[str, str | int]:
        """What the banner says of the model: name to value, such as ``layers`` and ``width``."""
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


@attrs.frozen
class OptimizerContext:
    """What an optimizer may know when it is built.

    It is built on every rank, and once more on the meta device to plan, where there is nobody to talk to.

    Args:
        parameters: trainable parameters by name, in the model's order, the same on every rank.
        roles: role of each parameter, by name.
        hidden_size: the model's D.
        world: the ranks.
        total_batch_size: tokens an optimizer step, all ranks.
        num_iterations: optimizer steps of the run.
        relative_data: D / D12: tokens that the data : parameter ratio asks for, over those it asks for the family's
            reference model (see ``Model.reference_counts``); None for a model without. Scaling rules go by it, even
            when something else sets the horizon.
    """

    parameters: Mapping[str, nn.Parameter]
    roles: Mapping[str, str]
    hidden_size: int
    world: World
    total_batch_size: int
    num_iterations: int
    relative_data: float | None = None


@attrs.frozen
class Multipliers:
    """What the schedule says for one step.

    Args:
        step: optimizer steps already done.
        num_iterations: optimizer steps of the run.
        lr: factor on every learning rate.
        warmdown: how far the schedule's last phase has come, from 0 (before it) to 1.
    """

    step: int
    num_iterations: int
    lr: float
    warmdown: float = 0.0


class Optimizer(ABC):
    """Two halves, because clipping and skipping need the global norm before any update.

    One step: backward passes; before the last, ``begin_reduce``; then ``reduce``, then ``update`` or ``discard``.
    """

    def begin_reduce(self) -> None:
        """The next backward pass is the step's last: gradients it completes may be sent at once."""

    @abstractmethod
    def reduce(self) -> Tensor:
        """Sum gradients over ranks. Returns the float32 L2 norm of the sums, (), the same on every rank.

        A rank that was told to stop while it waited for data has none, which count as zeros: it calls ``begin_reduce``
        and ``reduce`` without a backward pass, and then all ranks call ``discard``."""

    @abstractmethod
    def update(self, scale: float, multipliers: Multipliers) -> None:
        """One step with gradients times ``scale`` (it holds clipping and the division by the number of tokens);
        clears the gradients."""

    @abstractmethod
    def discard(self) -> None:
        """Clear the gradients without touching parameters or moments."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Flat, keys ``<parameter name>/<what>``, the same for any number of ranks. Collective."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what ``state_dict`` gave, exactly."""

    @abstractmethod
    def state_bytes(self) -> int:
        """Bytes of state this rank holds after the first update, known before it."""

    def resolved_options(self) -> Mapping[str, Resolved]:
        """What each option left to "auto" became, by option name."""
        return {}

    def describe(self) -> Mapping[str, str | int]:
        """What the banner says of the optimizer: name to value, such as the learning rates in force."""
        return {}


# ---------------------------------------------------------------------------------------------------- evaluators


@attrs.frozen
class EvaluatorContext:
    """What an evaluator may know when it is built.

    Args:
        tokenizer: the run's.
        world: the ranks; every rank calls ``evaluate`` at the same time.
        max_seq_len: T of the training rows.
        device_batch_size: rows a device handles at once in training.
        rows: ``rows(split, tokens)`` gives this rank's share of the first ``tokens`` tokens of a split (fewer if it
            has fewer), as batches on the device, always [device_batch_size, max_seq_len], filled up with ``IGNORED``.
        time_left: seconds until the entry's ``time_budget`` is used up, infinity without one. Ranks may differ.
        directory: where to keep partial results that should survive an interruption; None: nowhere. Not created.
    """

    tokenizer: Tokenizer
    world: World
    max_seq_len: int
    device_batch_size: int
    rows: Callable[[Split, int], Iterator[Batch]]
    time_left: Callable[[], float] = lambda: math.inf
    directory: Path | None = None


@attrs.frozen
class Evaluation:
    """What an evaluator found.

    Args:
        metrics: metric name to value. An entry renamed in TOML gets its name and a slash in front of each.
        texts: name to text, for people (samples).
        examples: a row for each example, for people who want to look, and for comparisons: ``task``, ``example`` (the
            same for every model, such as a hash), ``value`` (the mean of a task's values is its score, such as 1 for
            right and 0 for wrong), optionally ``centered`` (the same, 0 for a guess), and what else a table can hold.
        files: file name to text: tables to keep besides.
        facts: what else should be recorded, as JSON, such as versions and counts.
        notes: lines for people.
    """

    metrics: Mapping[str, float] = attrs.field(factory=dict)
    texts: Mapping[str, str] = attrs.field(factory=dict)
    examples: Sequence[Mapping[str, Any]] = ()
    files: Mapping[str, str] = attrs.field(factory=dict)
    facts: Mapping[str, Any] = attrs.field(factory=dict)
    notes: Sequence[str] = ()


class Evaluator(ABC):
    """Looks at a model. Runs on every rank, the model in eval mode, without gradients; the result of rank 0 counts."""

    @abstractmethod
    def evaluate(self, model: Model, step: int) -> Evaluation: ...
