"""One process per device: the process group and its collectives."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NoReturn

import attrs
import torch
import torch.distributed as dist
from torch import Tensor

from nanochat_core.distributed.environment import Place, find_place
from nanochat_core.errors import ConfigError, NanochatError, PassesPlugins
from nanochat_core.files import shorten
from nanochat_core.hardware.machine import pick_device

TIMEOUT = timedelta(minutes=30)  # of the ranks' first meeting, and of each collective
PATIENCE = 10.0  # seconds until a rank says where it waits for the others


class OtherRankFailed(PassesPlugins, Exception):
    """Rank 0 failed and has reported the reason; carries the exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"rank 0 failed with exit code {exit_code}")
        self.exit_code = exit_code


@attrs.frozen
class World:
    """This process's place among the ranks, and collectives, which also work with a single rank."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums of ``values`` over all ranks, in float64, the same on every rank. One collective."""
        if self.size == 1:
            return [float(v) for v in values]
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.tensor(list(values), dtype=dtype, device=self.device)
        dist.all_reduce(total)
        return [float(v) for v in total.tolist()]

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum ``tensor`` over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite ``tensor`` on every rank with rank 0's."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)

    def broadcast_object(self, value: Any = None) -> Any:
        """Rank 0's ``value`` on every rank. It is pickled, which is safe among processes of one job."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Call ``work`` on rank 0. Returns its result on every rank.

        Raises:
            OtherRankFailed: on other ranks, when ``work`` raised on rank 0.
        """
        value, code = None, 0
        error: Exception | None = None
        if self.is_main:
            try:
                value = work()
            except Exception as raised:
                error = raised
                code = raised.exit_code if isinstance(raised, NanochatError) else 1
        value, code = self.broadcast_object((value, code))
        if error is not None:
            raise error
        if code:
            raise OtherRankFailed(code)
        return value

    def raise_on_main(self, error: NanochatError) -> NoReturn:
        """Raise ``error``, which all ranks have, so that it is reported once: rank 0 raises it, the others
        OtherRankFailed."""
        raise error if self.is_main else OtherRankFailed(error.exit_code)

    def all_gather_object(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        boxes: list[Any] = [None] * self.size
        dist.all_gather_object(boxes, value)
        return boxes

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def join_world() -> World:
    """Join the process group that the environment describes (our launcher's or torchrun's), or make a world of one.

    Raises:
        ConfigError: when the environment describes none, or the other ranks can't be reached.
    """
    place = find_place()
    rank, size = place.rank, place.size
    device = pick_device(place.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        if device.type == "mps":
            device = torch.device("cpu")  # no backend of torch.distributed supports MPS
        backend = "nccl" if device.type == "cuda" else "gloo"
        device_id = device if device.type == "cuda" else None
        with _saying_where(place):
            dist.init_process_group(backend, timeout=TIMEOUT, device_id=device_id)
    return World(rank=rank, size=size, device=device)


@contextlib.contextmanager
def _saying_where(place: Place) -> Iterator[None]:
    """Name the place where ranks meet, when the wait there is long or fails."""
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"

    def say() -> None:
        print(
            f"rank {place.rank} of {place.size} waits for the others at {shorten(where)}", file=sys.stderr, flush=True
        )

    timer = threading.Timer(PATIENCE, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (dist.DistError, ValueError) as error:
        reason = "".join(c if c.isprintable() else " " for c in str(error).split("\n")[0])[:300]
        raise ConfigError(
            f"rank {place.rank} of {place.size} can't meet the others at {shorten(where)} ({reason}): check "
            f"MASTER_ADDR and MASTER_PORT, or unset WORLD_SIZE to run alone"
        ) from error
    finally:
        timer.cancel()


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
