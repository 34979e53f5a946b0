"""What wandb would refuse, found before a run. Imports no wandb."""

from __future__ import annotations

import os
from collections.abc import Iterator

from nanochat_core import RunLabels
from nanochat_wandb.config import WandbConfig

# Values of WANDB_MODE, and what they mean here.
MODES = {"online": "online", "run": "online", "shared": "online", "offline": "offline", "dryrun": "offline",
         "disabled": "disabled"}  # fmt: skip
LONGEST = 128  # characters of names
LONGEST_TAG = 64


def mode_of_environment() -> str:
    """Return what WANDB_MODE asks for: "online", "offline" or "disabled"; empty when it is not set or unknown."""
    return MODES.get(os.environ.get("WANDB_MODE", ""), "")


def check(config: WandbConfig, labels: RunLabels) -> Iterator[tuple[str, str]]:
    """Yield options that wandb refuses, with the reason."""
    mode = os.environ.get("WANDB_MODE", "")
    if mode and mode not in MODES:
        yield "mode", f"the environment variable WANDB_MODE must be one of {', '.join(MODES)}, not {mode[:80]!r}"
    if not 1 <= len(labels.project) <= LONGEST or any(c in labels.project for c in "/\\#?%:"):
        yield "run.project", f"wandb wants 1 to {LONGEST} characters without any of / \\ # ? % :"
    for tag in labels.tags:
        if not 1 <= len(tag) <= LONGEST_TAG:
            yield "run.tags", f"wandb wants tags of 1 to {LONGEST_TAG} characters, not {len(tag)}"
    for key, name in (("run.name", labels.name), ("run.group", labels.group), ("entity", config.entity or "")):
        if len(name) > LONGEST:
            yield key, f"wandb wants at most {LONGEST} characters, not {len(name)}"
    if config.entity is not None and (not config.entity or "/" in config.entity):
        yield "entity", "must be the name of a user or team"
