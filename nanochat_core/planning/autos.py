"""The values of the core's options that are "auto", each with its formula."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from nanochat_core.hardware.casting import name_of
from nanochat_core.hardware.devices import GIB, cpu_has_bf16
from nanochat_core.hardware.machine import compute_dtype, peak_flops
from nanochat_core.interfaces.types import Resolved
from nanochat_core.planning.batch_size import largest_that_fits

# Compiling takes about 20 s and saves a fifth of the time; this is twice the break-even point.
WORTH_COMPILING = 240  # seconds
CPU_PEAKS = (1e9, 1e14)  # FLOPs per second: no CPU is slower or faster, whatever the dtype
REFERENCE_BATCH = 2**19  # tokens; the best batch size of the reference model


def auto_dtype(device: torch.device) -> Resolved:
    """Return ``train.dtype``: a 16-bit type where the hardware computes faster with it."""
    dtype = compute_dtype("auto", device)
    if device.type == "cpu":
        reason = "this CPU has AMX or avx512_bf16" if cpu_has_bf16() else "this CPU has no fast bfloat16"
    else:
        has = "has" if dtype is torch.bfloat16 else "has no"
        instead = ", but fast float16" if dtype is torch.float16 else ""
        reason = f"this {device.type.upper()} device {has} fast bfloat16{instead}"
    return Resolved(name_of(dtype), reason)


def auto_total_batch_size(relative_data: float) -> Resolved:
    """Return ``train.total_batch_size``, in tokens.

    Args:
        relative_data: training tokens of this run divided by those of the reference model (``Plan.relative_data``).
    """
    batch = 2 ** round(math.log2(REFERENCE_BATCH * relative_data**0.383))
    return Resolved(batch, f"2^19 (D / D12)^0.383, D / D12 = {relative_data:.3g}, to the nearest power of two")


def auto_device_batch_size(rows_per_rank: int, needs: Mapping[int, int], limit: int) -> Resolved:
    """Return ``train.device_batch_size``, in rows: the largest that fits into memory, or else the smallest.

    Args:
        rows_per_rank: rows per rank and optimizer step.
        needs: estimated bytes that training needs, by rows of a micro-batch, in rising order.
        limit: bytes that are available.
    """
    sizes = list(needs)
    rows = largest_that_fits(sizes, sizes[-1], lambda b: needs[b] <= limit) or sizes[0]
    size, most = f"{needs[rows] / GIB:.2f} GiB", f"{limit / GIB:.2f} GiB"
    if needs[rows] > limit:
        return Resolved(rows, f"the smallest, although its estimated {size} exceed the {most} available")
    text = f"the largest of {', '.join(map(str, sizes))} (divisors of the {rows_per_rank} rows per rank and step) "
    return Resolved(rows, f"{text}that fits: an estimated {size} of {most}")


def auto_compile(device: torch.device, dtype: torch.dtype, flops: float, *, measure: bool = True) -> Resolved:
    """Return ``train.compile``: true where compiling saves more time than it takes.

    Args:
        flops: floating-point operations of the whole training.
        measure: whether to measure the speed of a CPU where the answer depends on it; otherwise the value stays "auto".
    """
    if device.type == "mps":
        return Resolved(False, "off on MPS")
    if device.type == "cuda":
        return Resolved(True, "on for CUDA")
    slowest, fastest = (flops / (0.25 * peak) for peak in CPU_PEAKS)  # eager training reaches a quarter of the peak
    if fastest > WORTH_COMPILING or slowest <= WORTH_COMPILING:
        worth, how = (True, "more than") if fastest > WORTH_COMPILING else (False, "less than")
        return Resolved(worth, f"{how} {WORTH_COMPILING} s of training, which repay the compile time")
    if not measure:
        return Resolved("auto", "nanochat run decides, after it has measured the speed of this machine")
    seconds = flops / (0.25 * peak_flops(device, dtype)[0])
    worth = seconds > WORTH_COMPILING
    return Resolved(
        worth, f"about {seconds:.0f} s of training are {'enough' if worth else 'too few'} to repay the compile time"
    )
