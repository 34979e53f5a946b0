"""Where each value of an experiment came from."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from nanochat_core.errors import ConfigError, NanochatError


@attrs.frozen
class Origin:
    """Where a value came from.

    Args:
        text: ``file:line``, ``--set KEY=VALUE``, ``default``, ``kept from RUN``, or the formula of an auto value.
        layer: 0 for the innermost base file, rising towards ``--set``; -1 for defaults.
    """

    text: str
    layer: int = -1

    def kept_from(self, run: str) -> Origin:
        """The origin of a value that stays what it is in ``run``, where the experiment says "auto"."""
        return Origin(f"kept from {run}" + (f" [{self.text}]" if self.layer >= 0 else ""))


DEFAULT = Origin("default")


def add_places(error: NanochatError, origins: Mapping[str, Origin]) -> None:
    """Put file and line in front of a message that begins with a key of the experiment, in place."""

    def place(key: str) -> str:
        origin = origins.get(key)
        return "" if origin is None or origin.layer < 0 else origin.text

    if isinstance(error, ConfigError):
        keys = [p.key or p.message.partition(": ")[0] for p in error.problems]
        placed = zip(error.problems, keys, strict=True)
        error.problems = tuple(attrs.evolve(p, where=p.where or place(key)) for p, key in placed)
        error.args = ("\n".join(map(str, error.problems)),)
    elif place(str(error).partition(": ")[0]):
        error.args = (f"{place(str(error).partition(': ')[0])}: {error}",)
