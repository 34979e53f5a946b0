"""Training steps, dealt to ranks.

G rows per step, S lanes, R ranks, B rows per device batch, T tokens per row. Lane s fills slots [s G/S, (s+1) G/S) of
every step; rank r takes slots [r G/R, (r+1) G/R). The rows of a step are the same for every R.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import attrs
import numpy as np
import torch
from torch import Tensor

from nanochat_core.data.best_fit import BestFitLane
from nanochat_core.data.packing import START, WINDOW, Cursor, Lane, Packing, Rows, StreamLane, TokenSource, join
from nanochat_core.interfaces.types import Batch, Tokens

CPU = torch.device("cpu")
AHEAD = 2  # steps made in advance


@attrs.frozen
class Step:
    """The data of one optimizer step on one rank.

    Args:
        batches: micro-batches, each [B, T], on the CPU (pinned when the device is a GPU).
        cursors: positions of this rank's lanes after the step, by lane: the state to save.
        epoch: passes over the data so far, averaged over this rank's lanes.
        cropped: tokens cut off documents so that they end with a row of this rank; see ``packing.best_fit``.
        dropped: tokens of unfinished rows at the ends of windows.
        is_last: a lane of this rank has no rows for another step within the allowed epochs.
    """

    batches: list[Batch]
    cursors: dict[int, Cursor]
    epoch: float
    cropped: int = 0
    dropped: int = 0
    is_last: bool = False


def _use(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a thread starts on GPU 0, and pinning memory makes a context there


class TrainLoader:
    """An iterator over this rank's steps, endless unless ``epochs`` are limited. A background thread reads, tokenizes
    and packs two steps ahead.

    Steps made in advance are not state: a loader that starts from the cursors of a step gives exactly the next rows.
    Memory is bounded by the steps ahead, and of each lane a chunk of documents (``stream``) or two windows
    (``best_fit``). It ends its threads when it is closed, collected, or the interpreter exits.

    Args:
        source: all training documents, as tokens.
        rows_per_step: G, all ranks together.
        lanes: S; see ``packing.lanes``.
        device: where the batches will go.
        cursors: a cursor for every lane of this rank (others are ignored), or None to start from the beginning.
        packing, window: how rows are made; see ``packing``.
        epochs: passes over the data that may be made, None for any number. The last step within them has ``is_last``;
            requesting another one raises a DataError.
        threads: lanes that are read and tokenized at the same time.

    Raises:
        ValueError: when S, R or B don't divide what they should, or a cursor is missing.
        DataError, CheckpointError: see ``packing.Lane``; also while iterating, with the traceback of the thread.
    """

    def __init__(
        self,
        source: TokenSource,
        *,
        rows_per_step: int,
        lanes: int,
        max_seq_len: int,
        device_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device = CPU,
        cursors: Mapping[int, Cursor] | None = None,
        packing: Packing = "stream",
        window: int = WINDOW,
        epochs: int | None = None,
        threads: int = 1,
    ) -> None:
        if rows_per_step % lanes or rows_per_step % (world_size * device_batch_size):
            raise ValueError(
                f"{rows_per_step} rows per step can't be dealt to {lanes} lanes, "
                f"and to {world_size} ranks in batches of {device_batch_size}"
            )
        self._slots = range(rank * rows_per_step // world_size, (rank + 1) * rows_per_step // world_size)
        self._rows_per_lane = rows_per_step // lanes
        mine = range(self._slots.start // self._rows_per_lane, (self._slots.stop - 1) // self._rows_per_lane + 1)
        if cursors is not None and not set(mine) <= set(cursors):
            raise ValueError(f"no cursors for lanes {sorted(set(mine) - set(cursors))}")

        def open_lane(index: int) -> Lane:
            cursor = START if cursors is None else Cursor(*cursors[index])
            kind = BestFitLane if packing == "best_fit" else StreamLane
            return kind(source, max_seq_len, index, lanes, cursor, epochs, window)

        self._lanes = {index: open_lane(index) for index in mine}
        self._device_batch_size, self._device = device_batch_size, device
        self._is_limited = epochs is not None
        self._error: BaseException | None = None
        self._ahead: deque[Future[Step]] = deque()
        # One thread: steps are made one after the other, and Python joins it at exit.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="train-loader", initializer=_use, initargs=(device,))
        self._helpers = ThreadPoolExecutor(threads, thread_name_prefix="train-loader-lane") if threads > 1 else None

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        if self._error is not None:
            raise self._error
        while len(self._ahead) <= AHEAD:
            self._ahead.append(self._thread.submit(self._make_step))
        try:
            step = self._ahead[0].result()
        except Exception as error:
            self._error = error  # lanes have advanced by a part of the step: later steps would be wrong
            self.close()
            raise
        self._ahead.popleft()
        return step

    def _make_step(self) -> Step:
        B = self._device_batch_size
        each_lane = self._helpers.map if self._helpers is not None else map
        rows = join(list(each_lane(self._next_rows, self._lanes)))
        ids, targets = self._tensor(rows.tokens[:, :-1]), self._tensor(rows.tokens[:, 1:])
        return Step(
            batches=[Batch(ids[i : i + B], targets[i : i + B]) for i in range(0, len(ids), B)],
            cursors={index: lane.cursor for index, lane in self._lanes.items()},
            epoch=sum(lane.epoch for lane in self._lanes.values()) / len(self._lanes),
            cropped=int(rows.cropped.sum()),
            dropped=int(rows.dropped.sum()),
            is_last=self._is_limited and not all(each_lane(self._has_next_rows, self._lanes)),
        )

    def _next_rows(self, index: int) -> Rows:
        """The next rows of a lane that are this rank's. A lane shared with another rank is advanced by both."""
        first = index * self._rows_per_lane
        rows = self._lanes[index].next_rows(self._rows_per_lane)
        return rows.part(max(self._slots.start - first, 0), self._slots.stop - first)

    def _has_next_rows(self, index: int) -> bool:
        return self._lanes[index].has(self._rows_per_lane)

    def _tensor(self, tokens: Tokens) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(tokens, dtype=np.int64))
        return tensor.pin_memory() if self._device.type == "cuda" else tensor

    def documents(self, before: Mapping[int, Cursor], step: Step) -> list[int]:
        """Indices of the documents in this rank's part of a step, ascending.

        Args:
            before: cursors of the lanes before the step; a lane without one is at the start.
        """
        found = [self._lanes[lane].documents(before.get(lane, START), c) for lane, c in step.cursors.items()]
        return sorted({document for documents in found for document in documents})

    def close(self) -> None:
        """End the threads and drop the steps made in advance. May be called twice."""
        self._ahead.clear()
        if self._helpers is not None:
            self._helpers.shutdown(
                wait=False, cancel_futures=True
            )  # a step in progress fails, and is not requested any more
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._helpers is not None:
            self._helpers.shutdown(wait=True)
        self._error = self._error or RuntimeError("the loader is closed")

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
