"""The class that the contract checks of all kinds use to collect broken rules."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nanochat_core.distributed.world import World
from nanochat_core.plugins.calls import describe, is_not_a_plugins

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
        except BaseException as error:  # a plugin may raise anything, such as SystemExit
            if is_not_a_plugins(error) and not isinstance(error, Exception):
                raise
            self.wrong.append(f"{name or part.__name__.strip('_').replace('_', ' ')}: {describe(error)}")

    def finish(self) -> None:
        assert not self.wrong, f"the {self.what} breaks its contract:\n" + "\n".join(self.wrong)
