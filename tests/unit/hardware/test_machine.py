"""The device that a process takes."""

from __future__ import annotations

import pytest
import torch

from nanochat_core.errors import ConfigError
from nanochat_core.hardware.machine import pick_device


@pytest.mark.parametrize("word", ["gpu", "CUDA", "cuda:0", "cpu ", "\x1b[2J", "x" * 5000])
def test_an_unknown_device_is_refused(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setenv("NANOCHAT_DEVICE", word)
    with pytest.raises(ConfigError, match=r"NANOCHAT_DEVICE: is '.*, not one of cpu, cuda, mps: unset it") as caught:
        pick_device(0)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setenv("NANOCHAT_DEVICE", kind)
    with pytest.raises(ConfigError, match=f"NANOCHAT_DEVICE: is {kind}, but torch finds no such device here"):
        pick_device(0)
    monkeypatch.setenv("NANOCHAT_DEVICE", "")
    assert pick_device(0) == torch.device("cpu")


def test_each_process_has_a_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NANOCHAT_DEVICE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device(1) == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="this is process 3 of this machine, which has 2 CUDA devices"):
        pick_device(2)
