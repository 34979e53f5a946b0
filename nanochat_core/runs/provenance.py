"""The provenance of a run: code, packages, machine, and the origin of every value. Imports no torch."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanochat_core import __version__
from nanochat_core.config.origins import Origin
from nanochat_core.errors import mask_credentials
from nanochat_core.plugins.distribution import NAME


def describe_code() -> dict[str, str]:
    """Commit of nanochat's source and the sha256 of its uncommitted diff, when it runs from a git checkout."""

    def git(*arguments: str) -> bytes:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, check=True, timeout=10).stdout

    try:
        if b"nanochat_core/runs/provenance.py" not in git("ls-files", "--full-name", Path(__file__).name):
            return {}
        diff = git("diff", "HEAD")
        facts = {"commit": git("rev-parse", "HEAD").decode().strip()}
    except (OSError, subprocess.SubprocessError):
        return {}
    return facts if not diff else {**facts, "diff_sha256": hashlib.sha256(diff).hexdigest()}


def provenance(
    origins: Mapping[str, Origin], distributions: Mapping[str, str], fingerprints: Mapping[str, str], plan: Any
) -> dict[str, Any]:
    """The content of ``provenance.json``."""
    packages = {NAME: __version__, "numpy": importlib.metadata.version("numpy")}
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [mask_credentials(argument) for argument in sys.argv],
        "code": describe_code(),
        "plugins": dict(distributions),
        "packages": packages,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "fingerprints": dict(fingerprints),
        "plan": plan,
        "origins": {key: origin.text for key, origin in sorted(origins.items())},
    }
