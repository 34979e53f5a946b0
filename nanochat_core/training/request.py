"""What ``nanochat run`` is asked to do. Imports no torch, so that a mistake in an experiment is reported at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import attrs

from nanochat_core.config.load import LoadedExperiment, load
from nanochat_core.plugins.discovery import Plugins, load_plugins


@attrs.frozen
class RunRequest:
    """What ``nanochat run`` is asked to do.

    Args:
        file: the experiment.
        overrides: ``key=value`` texts that lie over it.
        runs_dir: where run directories are.
        resume: None for a fresh run, "newest", "auto", or a reference to a run.
        allow_other_data: whether a resumed run may go on with data of other fingerprints.
    """

    file: Path
    overrides: Sequence[str]
    runs_dir: Path
    resume: str | None = None
    allow_other_data: bool = False

    def load(self) -> tuple[Plugins, LoadedExperiment]:
        """What is installed, and the experiment.

        Raises:
            ConfigError: with every problem found.
        """
        plugins = load_plugins()
        return plugins, load(self.file, self.overrides, plugins).require_all()
