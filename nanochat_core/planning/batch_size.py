"""Sizes of a micro-batch: the possible ones, and the largest that fits into memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nanochat_core.hardware.devices import DeviceSpec

# A GPU belongs to the run alone: a tenth is left for gaps of the allocator, workspaces of kernels and messages between
# ranks. Other devices share the memory of the machine with all other processes.
PART_OF_GPU, PART_OF_MACHINE = 0.9, 0.5
MOST_TOKENS_ON_GPU = 2**22  # in a micro-batch: more fit on no GPU
MOST_SIZES = 64  # of a micro-batch, since the memory of each is estimated
MOST_TOKENS_ELSEWHERE = 2**14  # in a micro-batch on a CPU or MPS: larger ones are not faster


def divisors(number: int) -> list[int]:
    """Return all divisors of ``number`` in rising order."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def room(spec: DeviceSpec, ranks: int) -> int:
    """Return the bytes of a device's memory that training may use; without GPUs the ranks share one machine."""
    return int(spec.memory * (PART_OF_GPU if spec.type == "cuda" else PART_OF_MACHINE / ranks))


def sizes(rows_per_rank: int, max_seq_len: int, spec: DeviceSpec) -> list[int]:
    """Return the rows of a micro-batch that "auto" chooses from: divisors of the rows per rank and step, rising."""
    tokens = MOST_TOKENS_ON_GPU if spec.type == "cuda" else MOST_TOKENS_ELSEWHERE
    found = [rows for rows in divisors(rows_per_rank) if rows <= max(1, tokens // max_seq_len)]
    while len(found) > MOST_SIZES:
        found = [*found[:-1:2], found[-1]]
    return found


def largest_that_fits(choices: Sequence[int], start: int, fits: Callable[[int], bool]) -> int | None:
    """Return the largest of the rising ``choices`` that fits, or None; the search goes up or down from ``start``."""
    index = choices.index(start)
    if fits(start):
        while index + 1 < len(choices) and fits(choices[index + 1]):
            index += 1
        return choices[index]
    return next((rows for rows in reversed(choices[:index]) if fits(rows)), None)
