"""Whether the Aim repository can be used, found before a run. Imports no Aim."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from nanochat_aim.config import AimConfig
from nanochat_core import RunLabels, directory_problem


def check(config: AimConfig, labels: RunLabels) -> Iterator[tuple[str, str]]:
    """Yield why the repository can't be used."""
    repo = config.repo
    if repo is None:
        return
    if "://" in repo:
        if not re.fullmatch(r"aim://[^\s/:]+:\d{1,5}(/\S*)?", repo):
            yield "repo", "a server is written as aim://host:port"
        return
    problem = directory_problem(Path(repo).absolute()) if repo.strip() else "it is empty"
    if problem:
        yield "repo", f"{problem}: give a directory that can be written"
