"""Collectives among ranks that may fail: ranks agree on the next operation before they exchange anything."""

from __future__ import annotations

import contextlib
import math
import pickle
import time
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor

from nanochat_core.distributed.signals import StopRequest
from nanochat_core.distributed.world import World
from nanochat_core.errors import PassesPlugins

FAILED, FINISHED = 1, 2


STOPPED = "stopped by a signal"  # in place of an error


OPERATIONS = {"sum": 3, "all_reduce": 4, "broadcast": 5, "broadcast_object": 6, "all_gather_object": 7, "barrier": 8}


def _pickled(value: Any, operation: str) -> bytes:
    """The value as bytes. What can't be pickled fails here, before other ranks wait for it."""
    try:
        return pickle.dumps(value)
    except Exception as error:  # objects pickle themselves, so that it can be anything
        raise TypeError(f"{operation} can't pickle a {type(value).__name__}: {error}") from error


class Cancelled(PassesPlugins, Exception):
    """Another rank failed, so this evaluation ends on all ranks."""


@attrs.define
class _Turn:
    """One evaluation in progress.

    Args:
        active: an evaluator is running.
        settled: the ranks have agreed that it can't continue.
    """

    active: bool = False
    settled: bool = False
    deadline: float = math.inf


@attrs.frozen
class EvaluationWorld(World):
    """The world that evaluators get. Before each collective the ranks compare what each is about to do. When one has
    failed, or they are about to do different things, the evaluation is cancelled on all ranks; otherwise they would
    wait for each other forever.

    Args:
        stop: interrupts an evaluation, but never inside a collective.
    """

    stop: StopRequest = attrs.field(factory=StopRequest, eq=False)
    _turn: _Turn = attrs.field(factory=_Turn, eq=False)

    @classmethod
    def of(cls, world: World, stop: StopRequest | None = None) -> EvaluationWorld:
        return cls(world.rank, world.size, world.device, stop or StopRequest())

    def begin(self, seconds: float | None) -> None:
        """Start an evaluation, which may take this many seconds (None: any number)."""
        self._turn.active, self._turn.settled = True, False
        self._turn.deadline = math.inf if seconds is None else time.monotonic() + seconds

    def time_left(self) -> float:
        """Seconds until this evaluation's time budget is used up."""
        return self._turn.deadline - time.monotonic()

    def settle(self, error: str) -> dict[int, str]:
        """End the evaluation on this rank, with ``error`` unless that is empty. Return the errors by rank, the same on
        every rank; empty when no rank failed."""
        with contextlib.suppress(Cancelled):
            self._agree(FAILED if error else FINISHED)
        went_wrong = self._turn.settled or bool(error)
        self._turn.active = False
        if not went_wrong:
            return {}
        errors = super().all_gather_object(error) if self.size > 1 else [error]
        if not any(errors):
            return {0: "ranks were at different points of the evaluation: every rank must call the same collectives"}
        return {rank: text for rank, text in enumerate(errors) if text}

    def _agree(self, code: int) -> None:
        """Raise Cancelled on all ranks unless all of them are about to do the same."""
        if not self._turn.active or self.size == 1:
            return
        if self._turn.settled:
            raise Cancelled("the evaluation has been cancelled")
        codes = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        codes[self.rank] = code
        dist.all_reduce(codes)
        if bool((codes == FAILED).any()) or len(set(codes.tolist())) > 1:
            self._turn.settled = True
            raise Cancelled("another rank failed or calls a different collective")

    @contextlib.contextmanager
    def _together(self, operation: str) -> Iterator[None]:
        with self.stop.postponed():
            self._agree(OPERATIONS[operation])
            yield

    def sum(self, values: Sequence[float]) -> list[float]:
        with self._together("sum"):
            return super().sum(values)

    def all_reduce(self, tensor: Tensor) -> None:
        with self._together("all_reduce"):
            super().all_reduce(tensor)

    def broadcast(self, tensor: Tensor) -> None:
        with self._together("broadcast"):
            super().broadcast(tensor)

    def broadcast_object(self, value: Any = None) -> Any:
        if self.size == 1:
            return value
        data = _pickled(value, "broadcast_object")
        with self._together("broadcast_object"):
            return pickle.loads(super().broadcast_object(data))

    def all_gather_object(self, value: Any) -> list[Any]:
        if self.size == 1:
            return [value]
        data = _pickled(value, "all_gather_object")
        with self._together("all_gather_object"):
            return [pickle.loads(each) for each in super().all_gather_object(data)]

    def barrier(self) -> None:
        with self._together("barrier"):
            super().barrier()
