"""Directories outside a run."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Where downloads and derived data are kept: ``NANOCHAT_HOME``, else ``~/.cache/nanochat``; created if absent."""
    path = Path(os.environ.get("NANOCHAT_HOME") or Path.home() / ".cache" / "nanochat").expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path
