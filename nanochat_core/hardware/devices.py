"""Specifications of devices that runs are planned for, present or not, and the device that a plan is made for."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator, Mapping
from contextvars import ContextVar

import attrs
import torch

GIB = 2**30


@attrs.frozen
class DeviceSpec:
    """The properties of a device that a plan depends on.

    Args:
        type: as in ``torch.device``.
        name: name to show.
        memory: in bytes.
        capability: compute capability of a CUDA device; (0, 0) for others.
        peak: dense bf16 FLOPs per second; None if it has to be measured.
    """

    type: str
    name: str
    memory: int
    capability: tuple[int, int] = (0, 0)
    peak: float | None = None


# Part of the name that the driver gives it (the first match counts), memory in GiB as the driver reports it, compute
# capability, and peak dense bf16 FLOPs per second from the vendor's data sheet.
_GPUS = (
    ("B300", 268, (10, 3), 2250e12),
    ("GB200", 185, (10, 0), 2500e12),
    ("B200", 179, (10, 0), 2250e12),
    ("H200", 140, (9, 0), 989e12),
    ("H100 NVL", 93, (9, 0), 835e12),
    ("H100 PCIe", 79, (9, 0), 756e12),
    ("H100", 79, (9, 0), 989e12),
    ("H800", 79, (9, 0), 989e12),
    ("A100-SXM4-40GB", 39, (8, 0), 312e12),
    ("A100", 79, (8, 0), 312e12),
    ("A800", 79, (8, 0), 312e12),
    ("A40", 45, (8, 6), 149.7e12),
    ("A30", 24, (8, 0), 165e12),
    ("A10G", 22, (8, 6), 70e12),
    ("A10", 22, (8, 6), 125e12),
    ("L40S", 45, (8, 9), 362e12),
    ("L40", 45, (8, 9), 181e12),
    ("L4", 22, (8, 9), 121e12),
    ("5090", 31, (12, 0), 209.5e12),
    ("4090", 23, (8, 9), 165.2e12),
    ("3090", 23, (8, 6), 71e12),
)

# By the name that ``--device`` takes: h100, h100-nvl, a100-sxm4-40gb.
KNOWN_DEVICES: Mapping[str, DeviceSpec] = {
    part.lower().replace(" ", "-"): DeviceSpec("cuda", part, memory * GIB, capability, peak)
    for part, memory, capability, peak in _GPUS
}

# The device of the innermost ``planning_for``; None outside. A model on the meta device has no other way to find the
# device that it is planned for.
_planned: ContextVar[DeviceSpec | None] = ContextVar("device that is planned for", default=None)


def known_gpu(name: str) -> DeviceSpec | None:
    """The specification of the GPU that the driver calls ``name``; None when it is not known."""
    return next((spec for spec in KNOWN_DEVICES.values() if spec.name in name), None)


def _planned_device() -> DeviceSpec | None:
    """The device that is planned for; None in compiled code, which never plans: torch can't trace a ContextVar."""
    return None if torch.compiler.is_compiling() else _planned.get()


@contextlib.contextmanager
def planning_for(spec: DeviceSpec) -> Iterator[None]:
    """Return a context in which the functions below, called in the same thread for the meta device or a device of the
    type of ``spec``, describe ``spec``, which need not be present."""
    token = _planned.set(spec)
    try:
        yield
    finally:
        _planned.reset(token)


def device_type(device: torch.device) -> str:
    """The type of a device; for the meta device, the type of the device that is planned for."""
    planned = _planned_device()
    return planned.type if device.type == "meta" and planned is not None else device.type


def cuda_capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; (0, 0) for others."""
    if device_type(device) != "cuda":
        return 0, 0
    planned = _planned_device()
    return planned.capability if planned is not None else torch.cuda.get_device_capability(device)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device has hardware for matrix products in bfloat16."""
    kind = device_type(device)
    if kind == "cuda":
        if (planned := _planned_device()) is not None:
            return planned.capability >= (8, 0)
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return kind == "cpu" and cpu_has_bf16()


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 faster than float32 (AMX or avx512_bf16)."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    except AttributeError:  # private in torch 2.9 to 2.13; without them float32 is a safe choice
        return False
