"""Devices that are planned for, here or not."""

from __future__ import annotations

import pytest
import torch

from nanochat_core import cuda_capability, device_type
from nanochat_core.hardware.devices import KNOWN_DEVICES, DeviceSpec, has_fast_bfloat16, known_gpu, planning_for

META, CPU, CUDA = torch.device("meta"), torch.device("cpu"), torch.device("cuda")
H100, OLD = KNOWN_DEVICES["h100"], DeviceSpec("cuda", "old", 2**30, (7, 5))


def test_the_meta_device_stands_for_what_is_planned() -> None:
    assert device_type(META) == "meta"
    with planning_for(H100):
        assert device_type(META) == "cuda"
        assert device_type(CPU) == "cpu"
        assert cuda_capability(META) == (9, 0)
        assert has_fast_bfloat16(META)
        with planning_for(OLD):
            assert cuda_capability(CUDA) == (7, 5)
            assert not has_fast_bfloat16(CUDA)
        assert cuda_capability(META) == (9, 0)
    assert device_type(META) == "meta"
    assert cuda_capability(META) == (0, 0)


def test_planning_ends_with_an_error() -> None:
    with pytest.raises(KeyError), planning_for(H100):
        raise KeyError
    assert device_type(META) == "meta"


def test_the_type_of_a_device_can_be_asked_in_compiled_code() -> None:
    compiled = torch.compile(lambda x: x + 1 if device_type(x.device) == "cpu" else x, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)).item() == 1


def test_the_driver_has_longer_names() -> None:
    assert known_gpu("NVIDIA H100 80GB HBM3") is H100
    assert known_gpu("NVIDIA H100 PCIe") is KNOWN_DEVICES["h100-pcie"]
    assert known_gpu("Voodoo 2") is None
