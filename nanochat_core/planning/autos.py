"""What each "auto" of the core's options becomes, and the formula that gives it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from nanochat_core.hardware.casting import name_of
from nanochat_core.hardware.devices import GIB, cpu_has_bf16
from nanochat_core.hardware.machine import compute_dtype, peak_flops
from nanochat_core.interfaces.types import Resolved
from nanochat_core.planning.batch_size import largest_that_fits

REFERENCE_BATCH = 2**19  # tokens; the best batch of the reference model


def auto_dtype(device: torch.device) -> Resolved:
    """``train.dtype``: 16 bits where the hardware gains from them."""
    dtype = compute_dtype("auto", device)
    if device.type == "cpu":
        reason = "this CPU has AMX or avx512_bf16" if cpu_has_bf16() else "this CPU has no fast bfloat16"
    else:
        gains = "gains" if dtype is torch.bfloat16 else "does not gain"
        instead = ", but from float16" if dtype is torch.float16 else ""
        reason = f"this {device.type.upper()} device {gains} from bfloat16{instead}"
    return Resolved(name_of(dtype), reason)


def auto_total_batch_size(relative_data: float) -> Resolved:
    """``train.total_batch_size``, in tokens.

    Args:
        relative_data: data of this run over that of the reference model, see ``Plan.relative_data``.
    """
    batch = 2 ** round(math.log2(REFERENCE_BATCH * relative_data**0.383))
    return Resolved(batch, f"2^19 (D / D12)^0.383, D / D12 = {relative_data:.3g}, to the nearest power of two")


def auto_device_batch_size(rows_per_rank: int, needs: Mapping[int, int], limit: int) -> Resolved:
    """``train.device_batch_size``, in rows: the largest that fits.

    Args:
        rows_per_rank: rows of a rank per step.
        needs: bytes that training needs, estimated, by rows of a micro-batch, rising.
        limit: bytes there are.
    """
    sizes = list(needs)
    rows = largest_that_fits(sizes, sizes[-1], lambda b: needs[b] <= limit) or sizes[0]
    size, most = f"{needs[rows] / GIB:.2f} GiB", f"{limit / GIB:.2f} GiB"
    if needs[rows] > limit:
        return Resolved(rows, f"the smallest, though its {size}, estimated, are more than the {most} there are")
    text = f"the largest of {', '.join(map(str, sizes))} (they divide the {rows_per_rank} rows of a rank and step) "
    return Resolved(rows, f"{text}that fits: {size} of {most}, estimated")


def auto_compile(device: torch.device, dtype: torch.dtype, flops: float) -> Resolved:
    """``train.compile``: whether compiling saves more seconds than it takes.

    Args:
        flops: of the whole training.
    """
    if device.type == "mps":
        return Resolved(False, "off on MPS")
    if device.type == "cuda":
        return Resolved(True, "on for CUDA")
    peak, _ = peak_flops(device, dtype)
    seconds = flops / (0.25 * peak)  # eager training reaches about a quarter of the matmul peak
    worth = seconds > 240  # compiling takes some 20 s and saves a fifth: twice what earns it back
    return Resolved(
        worth, f"about {seconds:.0f} s of training {'earn' if worth else 'do not earn'} the compile time back"
    )
