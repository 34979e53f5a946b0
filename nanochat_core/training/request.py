"""The arguments of ``nanochat run``. Imports no torch, so that an error in an experiment is reported at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import attrs

from nanochat_core.config.load import LoadedExperiment, load
from nanochat_core.plugins.discovery import Plugins, load_plugins


@attrs.frozen
class RunRequest:
    """The arguments of ``nanochat run``.

    Args:
        file: TOML file of the experiment.
        overrides: ``key=value`` texts that override its keys.
        runs_dir: directory of all runs.
        resume: None for a fresh run, "newest", "auto", or a reference to a run.
        allow_other_data: whether a resumed run may continue with data of different fingerprints.
    """

    file: Path
    overrides: Sequence[str]
    runs_dir: Path
    resume: str | None = None
    allow_other_data: bool = False

    def load(self) -> tuple[Plugins, LoadedExperiment]:
        """Load the installed plugins and the experiment.

        Raises:
            ConfigError: with every problem found.
        """
        plugins = load_plugins()
        return plugins, load(self.file, self.overrides, plugins).require_all()
