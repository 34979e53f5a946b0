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
    """The context that the factory of an optimizer receives.

    An optimizer is built on every rank. For planning it is also built on the meta device, where it must not communicate
    with other ranks.

    Args:
        parameters: trainable parameters by name, in the model's order, the same on every rank.
        roles: role of each parameter, by name.
        hidden_size: the hidden size D of the model.
        world: the ranks.
        total_batch_size: tokens per optimizer step, over all ranks.
        num_iterations: optimizer steps of the run.
        relative_data: D / D12, the number of training tokens at the data : parameter ratio, divided by that of the
            family's reference model (see ``Model.reference_counts``); None for a model without one. Scaling rules use
            it even if another option sets the number of steps.
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
        warmdown: progress of the last phase of the schedule, from 0 (before it) to 1.
    """

    step: int
    num_iterations: int
    lr: float
    warmdown: float = 0.0


class Optimizer(ABC):
    """An optimizer whose step has two halves, since clipping and skipping need the global norm before any update.

    A step consists of backward passes, with ``begin_reduce`` before the last, then ``reduce``, then ``update`` or
    ``discard``.
    """

    def begin_reduce(self) -> None:
        """Prepare for the last backward pass of a step: the gradients that it completes may be sent at once."""

    @abstractmethod
    def reduce(self) -> Tensor:
        """Sum gradients over ranks. Returns the L2 norm of the sums, a float32 () tensor, equal on every rank.

        A rank that has to stop while it waits for data has no gradients, which count as zeros. It calls
        ``begin_reduce`` and ``reduce`` without a backward pass, and then all ranks call ``discard``.
        """

    @abstractmethod
    def update(self, scale: float, multipliers: Multipliers) -> None:
        """Update the parameters with the gradients times ``scale``, then clear the gradients.

        Args:
            scale: factor for clipping and for the division by the number of tokens.
            multipliers: values of the schedules for this step.
        """

    @abstractmethod
    def discard(self) -> None:
        """Clear the gradients without changing parameters or optimizer state."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Return the state as a flat dict with keys ``<parameter name>/<tensor name>``, equal for any number of ranks.

        Collective: every rank calls it.
        """

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a state that ``state_dict`` returned, exactly."""

    @abstractmethod
    def state_bytes(self) -> int:
        """Return the bytes of state that this rank holds after the first update; called before it."""

    def resolved_options(self) -> Mapping[str, Resolved]:
        """Return the values of options that are "auto", by option name."""
        return {}

    def describe(self) -> Mapping[str, str | int]:
        """Return lines about the optimizer for the plan: name to value, such as the learning rates in force."""
        return {}
