"""Facts and settings of this machine: compute dtype, peak FLOPs, memory, determinism."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from nanochat_core.errors import ConfigError, Problem
from nanochat_core.files import shorten
from nanochat_core.hardware.casting import dtype_of, name_of
from nanochat_core.hardware.devices import DeviceSpec, cuda_capability, has_fast_bfloat16, known_gpu


def compute_dtype(setting: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products for a value of ``[train] dtype``.

    "auto" is bfloat16 where the hardware accelerates it, else float16 where it accelerates that, else float32.
    """
    if setting != "auto":
        return dtype_of(setting)
    if has_fast_bfloat16(device):
        return torch.bfloat16
    return torch.float16 if cuda_capability(device) >= (7, 0) else torch.float32


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    return device.type.upper()


def device_spec(device: torch.device) -> DeviceSpec:
    """Specification of a local device."""
    name = device_name(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        known = known_gpu(name)
        capability = (properties.major, properties.minor)
        return DeviceSpec("cuda", name, properties.total_memory, capability, known.peak if known else None)
    return DeviceSpec(device.type, name, machine_memory())


def machine_memory() -> int:
    """Memory of the machine in bytes, or of the container if it is limited."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text(encoding="utf-8")))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return total


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Peak FLOPs per second and the source of the number: a table for known GPUs, else the best of a few matmuls."""
    if device.type == "cuda" and dtype.itemsize == 2:  # both 16-bit formats are equally fast
        known = known_gpu(torch.cuda.get_device_name(device))
        if known is not None and known.peak is not None:
            return known.peak, f"data sheet of {known.name}, dense 16 bits"
    size = 64
    seconds = _time_matmul(size, device, dtype, 2)
    # A CPU without instructions for a dtype takes a thousand times as long: sizes grow while they are quick.
    while size < (1024 if device.type == "cpu" else 4096) and seconds < 0.01:
        size *= 2
        seconds = _time_matmul(size, device, dtype, 2)
    if seconds < 0.1:
        seconds = min(seconds, _time_matmul(size, device, dtype, 24))
    return 2 * size**3 / seconds, f"measured, {size} x {size} matmul in {name_of(dtype)}"


def _time_matmul(size: int, device: torch.device, dtype: torch.dtype, most: int) -> float:
    """Return the seconds of a product of square matrices: the least of ``most``, or of those in a quarter second."""
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    times: list[float] = []
    while len(times) < 2 or (len(times) < most and sum(times[1:]) < 0.25):  # the first one warms up
        start = time.perf_counter()
        (a @ b).flatten()[0].item()
        times.append(time.perf_counter() - start)
    return min(times)


@contextlib.contextmanager
def determinism(deterministic: bool) -> Iterator[None]:
    """Return a context that, if ``deterministic``, uses only algorithms that are reproducible bit for bit.

    An operation without such an algorithm raises a RuntimeError. cuBLAS also needs an environment variable, which
    ``cli`` sets before torch is imported.
    """
    if not deterministic:
        yield
        return
    import torch._inductor.config as inductor

    settings: list[tuple[Any, str, bool]] = [
        (torch.backends.cudnn, "benchmark", False),  # chooses algorithms by timing them
        (torch.utils.deterministic, "fill_uninitialized_memory", False),  # finds errors, but costs time
        (inductor, "deterministic", True),  # not in torch 2.9
    ]
    settings = [(module, name, value) for module, name, value in settings if hasattr(module, name)]
    before = [getattr(module, name) for module, name, _ in settings]
    enabled = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)
        for module, name, value in settings:
            setattr(module, name, value)
        yield
    finally:
        torch.use_deterministic_algorithms(enabled)
        for (module, name, _), value in zip(settings, before, strict=True):
            setattr(module, name, value)


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory of this process in MiB: of the device on CUDA, resident memory elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if platform.system() == "Darwin" else used / 2**10


def keep_freed_memory() -> None:
    """Let malloc keep the memory that a step frees, instead of returning it and faulting it in again in the next step,
    which took 8% of a training step's CPU time at depth 4. Does nothing without glibc."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 * 2**20)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        libc.mallopt(parameter, value)


def pick_device(local_rank: int) -> torch.device:
    """The device of this process: CUDA, else Apple's MPS, else the CPU. ``NANOCHAT_DEVICE`` overrides the type.

    Raises:
        ConfigError: when ``NANOCHAT_DEVICE`` is another word or a device that is not there, or when there are fewer
            CUDA devices than processes.
    """
    wanted = os.environ.get("NANOCHAT_DEVICE", "")
    if wanted not in ("", "cpu", *ACCELERATORS):
        raise _odd_device(f"is {shorten(wanted)}, not one of {', '.join(('cpu', *ACCELERATORS))}")
    for kind, is_available in ACCELERATORS.items():
        if wanted in ("", kind) and is_available():
            if kind == "cuda" and local_rank >= torch.cuda.device_count():
                raise ConfigError(
                    f"this is process {local_rank + 1} of this machine, which has {torch.cuda.device_count()} CUDA "
                    f"devices, one for each process: start fewer processes, or set NANOCHAT_DEVICE=cpu"
                )
            return torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
        if wanted == kind:
            raise _odd_device(f"is {wanted}, but torch finds no such device here")
    return torch.device("cpu")


# By type, and whether one is here; asked when it is needed.
ACCELERATORS: Mapping[str, Callable[[], bool]] = {
    "cuda": lambda: torch.cuda.is_available(),
    "mps": lambda: torch.backends.mps.is_available(),
}


def _odd_device(message: str) -> ConfigError:
    return ConfigError(
        [Problem("", f"{message}: unset it to use what is here", "the environment variable NANOCHAT_DEVICE")]
    )
