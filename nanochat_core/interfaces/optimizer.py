"""The Optimizer interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import attrs
from torch import Tensor, nn

from nanochat_core.distributed.world import World
from nanochat_core.interfaces.types import Resolved


@attrs.frozen
class OptimizerContext:
    """Facts that the factory of an optimizer gets.

    It is built on every rank, and once more on the meta device to plan, where there are no other ranks to talk to.

    Args:
        parameters: trainable parameters by name, in the model's order, the same on every rank.
        roles: role of each parameter, by name.
        hidden_size: the model's D.
        world: the ranks.
        total_batch_size: tokens per optimizer step, over all ranks.
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
    """Values of the schedules for one step.

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
        """The value of each option left to "auto", by option name."""
        return {}

    def describe(self) -> Mapping[str, str | int]:
        """Lines of the plan about the optimizer: name to value, such as the learning rates in force."""
        return {}
