"""Checkpoints that somebody has changed and given right checksums again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from nanochat_core.files import file_sha256


def seal(checkpoint: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
    """Write sizes and checksums of the files as they are now into the manifest, then ``change`` it, then its own."""
    file = checkpoint / "manifest.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    for name, facts in manifest["files"].items():
        path = checkpoint / name
        if path.is_file():
            facts.update(bytes=path.stat().st_size, sha256=file_sha256(path))
    change(manifest)
    manifest = {key: value for key, value in manifest.items() if key != "sha256"}
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(manifest), encoding="utf-8")


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def edit_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)
