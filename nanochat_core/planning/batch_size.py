"""The micro-batch: which sizes there are, and the largest that fits into memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nanochat_core.hardware.devices import DeviceSpec

# A GPU is the run's own: a tenth is for the allocator's gaps, kernels' workspaces and messages of several ranks. Other
# devices share the machine's memory with everything else on it.
PART_OF_GPU, PART_OF_MACHINE = 0.9, 0.5
MOST_TOKENS_ELSEWHERE = 2**14  # of a micro-batch that is not on a GPU: larger ones are not faster


def divisors(number: int) -> list[int]:
    """In rising order."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def room(spec: DeviceSpec, ranks: int) -> int:
    """Bytes that training may take of a device's memory; without GPUs the ranks share one machine."""
    return int(spec.memory * (PART_OF_GPU if spec.type == "cuda" else PART_OF_MACHINE / ranks))


def sizes(rows_per_rank: int, max_seq_len: int, spec: DeviceSpec) -> list[int]:
    """Rows of a micro-batch that "auto" chooses from: what divides the rows a rank has in a step, rising."""
    most = rows_per_rank if spec.type == "cuda" else max(1, MOST_TOKENS_ELSEWHERE // max_seq_len)
    return [rows for rows in divisors(rows_per_rank) if rows <= most]


def largest_that_fits(choices: Sequence[int], start: int, fits: Callable[[int], bool]) -> int | None:
    """The largest of rising ``choices`` that fits, None when none does; asked from ``start`` on, up or down."""
    index = choices.index(start)
    if fits(start):
        while index + 1 < len(choices) and fits(choices[index + 1]):
            index += 1
        return choices[index]
    return next((rows for rows in reversed(choices[:index]) if fits(rows)), None)
