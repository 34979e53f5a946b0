"""Upgrades of older checkpoints: manifests to the current format, models to the current version of their plugin."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from nanochat_core.errors import CheckpointError
from nanochat_core.plugins.calls import plugin_call
from nanochat_core.plugins.choice import Choice
from nanochat_core.plugins.registry import Entry
from nanochat_core.plugins.structure import to_plain
from nanochat_core.runs.directory import RunDirectory

Parts = tuple[dict[str, Any], dict[str, Tensor]]


@attrs.frozen
class ModelRecord:
    """Plugin, version and options that a checkpoint's model was built from.

    Args:
        plugin: name of the entry; ``version``: see ``ModelVersion.number``.
        options: every option of the entry's config as plain data, None included, so that defaults do not matter later.
    """

    plugin: str
    version: int
    options: Mapping[str, Any]

    @classmethod
    def of(cls, choice: Choice) -> ModelRecord:
        assert choice.entry is not None, "load() refuses experiments with unknown plugins"
        return cls(choice.plugin, choice.entry.model_version.number, to_plain(choice.config, keep_none=True))


def upgrade_manifest(manifest: Mapping[str, Any], checkpoint: Path) -> Mapping[str, Any]:
    """The manifest in the current format.

    Raises:
        CheckpointError: when facts that the older format lacks can't be found elsewhere.
    """
    if manifest["version"] < 2:  # only the run's experiment has what the model was built from
        file = RunDirectory.of_checkpoint(checkpoint).experiment
        try:
            table = tomllib.loads(file.read_text(encoding="utf-8"))["model"]
            options = {name: value for name, value in table.items() if name != "plugin"}
            manifest = {**manifest, "model": {"plugin": table["plugin"], "version": 1, "options": options}}
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{checkpoint} needs [model] of its run's {file}: {error!r}") from error
    return manifest


def upgrade_model(record: ModelRecord, entry: Entry, tensors: dict[str, Tensor], source: str) -> Parts:
    """Options and tensors of a checkpoint's model as the installed ``entry`` has them.

    Raises:
        CheckpointError: when the checkpoint is newer than the plugin, or too old for it.
        PluginError: when the plugin's upgrade fails.
    """
    have, want = record.version, entry.model_version.number
    if have == want:
        return dict(record.options), tensors
    package = f"{entry.distribution} {entry.version}"
    if have > want:
        raise CheckpointError(
            f"{source} has version {have} of model {entry.name!r}, {package} supports versions up to {want}: "
            f"install a newer {entry.distribution}"
        )
    if not entry.model_version.upgrade:
        raise CheckpointError(
            f"{source} has version {have} of model {entry.name!r}, {package} has version {want} and can't read older "
            f"ones: install the {entry.distribution} it was made with (see its manifest.json)"
        )
    upgrade = entry.load_upgrade()
    with plugin_call(f"{package} can't upgrade version {have} of model {entry.name!r} in {source} to version {want}"):
        options, upgraded = upgrade(have, dict(record.options), dict(tensors))
        return dict(options), dict(upgraded)
