"""Checkpoints: saved atomically, verified by a manifest, loaded without pickles."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanochat_core.errors import CheckpointError
from nanochat_core.files import file_sha256, first_few, read_json, require_regular, sync
from nanochat_core.plugins.registry import Entry
from nanochat_core.runs.directory import list_checkpoints, step_of
from nanochat_core.runs.soundness import (
    MANIFEST,
    PARTS,
    STATE,
    VERSION,
    misfits,
    part_file,
    read_manifest,
    shapes_of,
    tensors_problem,
)
from nanochat_core.runs.state import TrainState
from nanochat_core.runs.upgrades import ModelRecord, upgrade_manifest, upgrade_model

LEFTOVER = re.compile(r"\.step_\d{6,18}\.(deleted\.)?\d+", re.ASCII)  # of a process that was killed
ROOM_A_TENSOR, ROOM_BESIDES = (
    256,
    2**16,
)  # bytes: its name and shape in a file's header; the JSON files and the file system


@attrs.frozen
class CheckpointContent:
    """Everything in a checkpoint.

    Args:
        model: parameters and buffers by name; ``optimizer``: ``<parameter>/<what>``; ``rng``: ``<rank>/<generator>``.
        state: of the run.
        built_from: plugin, version and options of the model.
        plugins: version of each distribution whose plugins the run uses.
    """

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    rng: Mapping[str, Tensor]
    state: TrainState
    built_from: ModelRecord
    plugins: Mapping[str, str] = attrs.field(factory=dict)


def checkpoint_name(step: int) -> str:
    return f"step_{step:06d}"


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers; a tensor with several names (tied weights) only once, under its first."""
    seen: set[tuple[int, int]] = set()
    tensors = {}
    for name, tensor in model.state_dict().items():
        storage = tensor.untyped_storage()
        where = storage._cdata if tensor.is_meta else storage.data_ptr()  # a meta tensor has no address
        key = (where, tensor.storage_offset())
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        tensors[name] = tensor.detach()
    return tensors


def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy ``tensors`` into ``model``.

    Raises:
        CheckpointError: when tensors are missing, not in the model, or differ in shape or type.
    """
    wanted = model_tensors(model)
    problems = misfits(shapes_of(tensors), shapes_of(wanted))
    if problems:
        raise CheckpointError(
            f"{source} does not fit the model: {first_few(problems, 6, '; ')}. Use the same model and tokenizer options"
        )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(tensors[name])


def save_checkpoint(directory: Path, content: CheckpointContent) -> Path:
    """Write ``directory/step_NNNNNN``: to a temporary directory, synced, then renamed. Call on one rank. Of the
    directories above it only the last is created: a run directory that was moved does not come back under its old name.

    Raises:
        CheckpointError: when it can't be written, or the disk has no room for it; no partial files are left.
    """
    final = directory / checkpoint_name(content.state.step)
    temporary = directory / f".{final.name}.{os.getpid()}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        directory.mkdir(exist_ok=True)
        _check_room(directory, content)
        temporary.mkdir()
        (temporary / STATE).write_text(json.dumps(content.state.to_json(), indent=1) + "\n", encoding="utf-8")
        for name in PARTS:
            tensors = {k: v.detach().cpu().contiguous() for k, v in getattr(content, name).items()}
            path = temporary / part_file(name)
            save_file(tensors, path, metadata={"format": "pt"})
            path.chmod((temporary / STATE).stat().st_mode & 0o777)  # not for its owner only, as safetensors writes it
        files = {p.name: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in sorted(temporary.iterdir())}
        manifest = {
            "version": VERSION,
            "step": content.state.step,
            "plugins": dict(content.plugins),
            "model": attrs.asdict(content.built_from),
            "files": files,
        }
        manifest["sha256"] = _digest(manifest)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        old = _set_aside(final) if final.exists() else None  # from before the run was rewound
        temporary.rename(final)
        sync(directory)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"checkpoint {final} could not be saved: {error}") from error
    return final


def _check_room(directory: Path, content: CheckpointContent) -> None:
    """Raise an OSError that says how much is missing when the checkpoint does not fit on the disk."""
    tensors = [tensor for name in PARTS for tensor in getattr(content, name).values()]
    needed = sum(tensor.nbytes for tensor in tensors) + ROOM_A_TENSOR * len(tensors) + ROOM_BESIDES
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(
            f"it needs {needed:,} bytes and {directory} has {free:,} free: {needed - free:,} bytes are missing; make "
            f"room, or keep fewer checkpoints with checkpoint.keep_last"
        )


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint. Killed half-way, it leaves nothing that looks like a checkpoint; see ``remove_leftovers``.

    Raises:
        OSError: when it can't be deleted.
    """
    shutil.rmtree(_set_aside(checkpoint))


def _set_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint so that no reader finds it."""
    aside = checkpoint.with_name(f".{checkpoint.name}.deleted.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)


def remove_leftovers(directory: Path) -> list[str]:
    """Delete files of processes that were killed while they saved or deleted a checkpoint. Returns the names. Call it
    under the run's lock: a save in progress looks the same."""
    try:
        found = sorted(path for path in directory.iterdir() if LEFTOVER.fullmatch(path.name))
    except OSError:
        return []
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in found if not path.exists()]


def _digest(manifest: Mapping[str, Any]) -> str:
    """Digest of a manifest's content, without the digest itself."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------------- reading


def verify(checkpoint: Path) -> str:
    """The reason why a checkpoint is not sound, or an empty string. Who reads a checkpoint calls this first."""
    try:
        manifest = read_manifest(checkpoint)
        if manifest["version"] > VERSION:
            return f"was written by a newer nanochat (version {manifest['version']}, this one reads {VERSION})"
        if (manifest["version"] > 2 or "sha256" in manifest) and manifest.get("sha256") != _digest(manifest):
            return f"{MANIFEST} is damaged (its sha256 differs)"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, RecursionError) as error:
        return f"{MANIFEST} is unreadable ({_reason(error)})"
    for name, facts in manifest["files"].items():
        path = checkpoint / name
        try:
            size = require_regular(path).st_size
            if size != facts["bytes"]:
                return f"{name} has {size} bytes, not {facts['bytes']}"
            if file_sha256(path) != facts["sha256"]:
                return f"{name} is damaged (its sha256 differs)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} is unreadable ({_reason(error)})"
    try:
        state = load_state(checkpoint)
        if state.step != manifest["step"]:
            return f"{STATE} is of step {state.step}, {MANIFEST} of step {manifest['step']}"
        return tensors_problem(checkpoint)
    except (OSError, ValueError) as error:
        return f"{STATE} is unreadable ({_reason(error)})"


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__


def latest_checkpoint(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest sound checkpoint (None without one), and a line for each newer one that is not sound."""
    damaged: list[str] = []
    for checkpoint, problem in verified_checkpoints(directory):
        if not problem:
            return checkpoint, damaged
        damaged.append(f"{checkpoint}: {problem}; it is skipped")
    return None, damaged


def verified_checkpoints(directory: Path) -> Iterator[tuple[Path, str]]:
    """Each checkpoint of a run, newest first, with the reason why it is not sound, or an empty string."""
    for checkpoint in list_checkpoints(directory):
        problem = verify(checkpoint)
        if not problem and (step := load_state(checkpoint).step) != step_of(checkpoint):
            problem = f"holds step {step}, not that of its name"
        yield checkpoint, problem


def load_checkpoint(checkpoint: Path) -> CheckpointContent:
    """Read a checkpoint that ``verify`` found sound, tensors on the CPU."""
    content: dict[str, Any] = {n: load_file(checkpoint / part_file(n)) for n in PARTS}
    return CheckpointContent(state=load_state(checkpoint), built_from=read_model(checkpoint), **content)


def load_state(checkpoint: Path) -> TrainState:
    """Only the state of the run.

    Raises:
        OSError, ValueError: when ``verify`` would not find it sound.
    """
    return TrainState.from_json(read_json(checkpoint / STATE))


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Only the model's tensors of a checkpoint, on the CPU, as they were saved."""
    return load_file(checkpoint / part_file("model"))


def read_model(checkpoint: Path) -> ModelRecord:
    """Plugin, version and options that a checkpoint's model was built from."""
    manifest = upgrade_manifest(read_manifest(checkpoint), checkpoint)
    return ModelRecord(**manifest["model"])


def saved_options(checkpoint: Path, entry: Entry) -> dict[str, Any]:
    """Options of a checkpoint's model as the installed ``entry`` has them. See ``upgrade_model`` for errors."""
    record = read_model(checkpoint)
    tensors = load_weights(checkpoint) if record.version < entry.model_version.number else {}
    return upgrade_model(record, entry, tensors, str(checkpoint))[0]


def saved_tensors(checkpoint: Path, entry: Entry) -> dict[str, Tensor]:
    """The model's tensors of a checkpoint, on the CPU, as the installed ``entry`` has them; those of another plugin as
    they are. See ``upgrade_model`` for errors."""
    record, tensors = read_model(checkpoint), load_weights(checkpoint)
    return tensors if record.plugin != entry.name else upgrade_model(record, entry, tensors, str(checkpoint))[1]
