"""Whether what a checkpoint holds is what a save writes, beyond its checksums: somebody else may have made it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanochat_core.files import name_problem, read_json, require_regular, shorten

VERSION = 3  # of the format; upgrades.py reads older ones
MANIFEST, STATE = "manifest.json", "state.json"
PARTS = ("model", "optimizer", "rng")  # a file of tensors each


def part_file(part: str) -> str:
    return f"{part}.safetensors"


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint, of which each entry has the type that a save writes.

    Raises:
        OSError: when it can't be read.
        ValueError: when it is no manifest, saying why.
    """
    manifest = read_json(checkpoint / MANIFEST)
    version = manifest.get("version")
    if not isinstance(version, int) or not is_count(version):
        raise ValueError(f"version must be a whole number, not {shorten(version)}")
    if version > VERSION:
        return manifest  # whatever it means there
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(facts, dict) for facts in files.values()):
        raise ValueError(f"files must be an object of objects, not {shorten(files)}")
    lacking = [name for name in (*map(part_file, PARTS), STATE) if name not in files]
    if lacking:
        raise ValueError(f"files lacks {', '.join(lacking)}")
    for name, facts in files.items():
        problem = name_problem(name)
        if problem:
            raise ValueError(f"the name of a file {problem}: {shorten(name)}")
        if not is_count(facts.get("bytes")) or not isinstance(facts.get("sha256"), str):
            raise ValueError(f"{name} needs bytes and sha256, not {shorten(facts)}")
    if not is_count(manifest.get("step")):
        raise ValueError(f"step must be a whole number, not {shorten(manifest.get('step'))}")
    plugins = manifest.get("plugins", {})
    if not isinstance(plugins, dict) or not all(isinstance(value, str) for value in plugins.values()):
        raise ValueError(f"plugins must be an object of texts, not {shorten(plugins)}")
    if version >= 2 or "model" in manifest:
        _check_model(manifest.get("model"))
    return manifest


def _check_model(model: object) -> None:
    if not isinstance(model, dict) or set(model) != {"plugin", "version", "options"}:
        raise ValueError(f"model must be an object with plugin, version and options, not {shorten(model)}")
    if not isinstance(model["plugin"], str) or name_problem(model["plugin"]):
        raise ValueError(f"model.plugin must be the name of a plugin, not {shorten(model['plugin'])}")
    if not is_count(model["version"]) or not isinstance(model["options"], dict):
        raise ValueError("model.version must be a whole number, and model.options an object")


def is_count(value: object) -> bool:
    """Whether a value is a whole number of at least 0 that fits into 63 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def is_number(value: object) -> bool:
    """Whether a value is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


# ----------------------------------------------------------------------------------------------------------- tensors

Shapes = dict[str, tuple[str, tuple[int, ...]]]  # safetensors' name of the dtype, and the shape, by name of the tensor


def shapes_in(file: Path) -> Shapes:
    """Return dtype and shape of each tensor in a safetensors file, of which only the header is read.

    Raises:
        OSError: when it can't be read.
        ValueError: when it is no safetensors file.
    """
    require_regular(file)
    try:
        with safe_open(file, "pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(shorten(str(error), 200)[1:-1]) from error


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """Return the same of tensors, which may be on the meta device."""
    names = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    names |= {torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32"}
    names |= {torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}
    return {name: (names.get(t.dtype, str(t.dtype)), tuple(t.shape)) for name, t in tensors.items()}


def misfits(found: Shapes, wanted: Shapes) -> list[str]:
    """Return a line for each tensor that is missing, or too many, or not what a model wants.

    Between float32, bfloat16 and float64 a tensor may be converted: the dtype of a model's matrix products, on which
    that of its parameters may depend, can be chosen again. Nothing else is.
    """
    problems = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    problems += [f"{shorten(name)[1:-1]} is not in the model" for name in found.keys() - wanted.keys()]
    for name in wanted.keys() & found.keys():
        (dtype, shape), (own_dtype, own_shape) = found[name], wanted[name]
        if shape != own_shape:
            problems.append(f"{name} is {list(shape)}, the model's {list(own_shape)}")
        elif dtype != own_dtype and not {dtype, own_dtype} <= {"F64", "F32", "BF16"}:
            problems.append(f"{name} is of type {dtype}, the model's {own_dtype}")
    return sorted(problems)


def tensors_problem(checkpoint: Path) -> str:
    """Return why the files of tensors of a checkpoint can't be those of a model; empty if they can."""
    shapes: dict[str, Shapes] = {}
    for part in PARTS:
        try:
            shapes[part] = shapes_in(checkpoint / part_file(part))
        except ValueError as error:
            return f"{part_file(part)} is damaged ({error})"
    for key in shapes["optimizer"]:
        if key.rpartition("/")[0] not in shapes["model"]:
            return f"{part_file('optimizer')} has {shorten(key)}, which belongs to no parameter of the model"
    for name, (dtype, shape) in shapes["rng"].items():
        if dtype != "U8" or len(shape) != 1 or not re.fullmatch(r"\d{1,6}/[a-z]+", name, re.ASCII):
            return f"{part_file('rng')} has {shorten(name)}, which is no state of a generator"
    return _generators_problem(checkpoint, [name for name in shapes["rng"] if name.endswith("/cpu")])


def _generators_problem(checkpoint: Path, names: list[str]) -> str:
    try:
        with safe_open(checkpoint / part_file("rng"), "pt") as tensors:
            for name in names:
                torch.Generator().set_state(tensors.get_tensor(name))
    except (RuntimeError, TypeError) as error:
        return f"{part_file('rng')} has no state of a generator ({shorten(str(error), 200)[1:-1]})"
    return ""
