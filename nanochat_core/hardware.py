"""What the machine can do: compute dtype, peak FLOPs, memory."""

from __future__ import annotations

import ctypes
import functools
import platform
import time

import torch

# Peak dense bf16 FLOPs a second by part of the device name, from the vendors' data sheets. First match counts.
_PEAKS = (
    ("B300", 2250e12),
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("5090", 209.5e12),
    ("4090", 165.2e12),
    ("3090", 71e12),
)


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 faster than float32 (AMX or avx512_bf16)."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    except AttributeError:  # private in torch 2.9 to 2.13; without it float32 is always right
        return False


def compute_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products for ``[train] dtype``: "auto" takes bfloat16 where the hardware gains from it."""
    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]
    if device.type == "cuda":
        gains = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        gains = cpu_has_bf16()
    else:
        gains = False
    return torch.bfloat16 if gains else torch.float32


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    return device.type.upper()


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """(peak FLOPs a second, where the number is from): a table for known GPUs, else the best of a few matmuls."""
    if device.type == "cuda" and dtype is torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, peak in _PEAKS:
            if part in name:
                return peak, f"data sheet of {part}, dense bf16"
    size = 1024 if device.type == "cpu" else 4096
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    times = []
    for _ in range(24):
        start = time.perf_counter()
        (a @ b).flatten()[0].item()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times), f"measured, {size} x {size} matmul in {str(dtype)[6:]}"


def peak_memory_mib(device: torch.device) -> float:
    """Most memory this process has used, MiB: of the device on CUDA, resident memory elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if platform.system() == "Darwin" else used / 2**10


def keep_freed_memory() -> None:
    """Let malloc keep what a step frees, instead of giving it back and faulting it in again at the next step: 8% of a
    training step's CPU time at depth 4. Does nothing without glibc."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 * 2**20)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        libc.mallopt(parameter, value)
