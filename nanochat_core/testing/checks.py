"""The class that the contract checks of all kinds use to collect broken rules."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import torch

from nanochat_core.distributed.world import World

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


class Check:
    """The broken rules that a contract check has found, which ``finish`` raises together."""

    def __init__(self, what: str) -> None:
        self.what, self.wrong = what, list[str]()

    def expect(self, holds: bool, message: str) -> None:
        if not holds and message not in self.wrong:
            self.wrong.append(message)

    def run(self, part: Callable[[], None], name: str = "") -> None:
        """Run a part of the check. What it raises is a broken rule, told with the part's name."""
        try:
            part()
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
            self.wrong.append(f"{name or part.__name__.strip('_').replace('_', ' ')}: {reason}")

    def finish(self) -> None:
        assert not self.wrong, f"the {self.what} breaks its contract:\n" + "\n".join(self.wrong)
