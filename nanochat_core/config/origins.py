"""The origin of each value of an experiment."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from nanochat_core.errors import NanochatError, mask_credentials


@attrs.frozen
class Origin:
    """The origin of a value.

    Args:
        text: ``file:line``, ``--set KEY=VALUE``, ``default``, ``kept from RUN``, or the formula of an auto value.
        layer: 0 for the innermost base file, rising towards ``--set``; -1 for defaults.
    """

    text: str = attrs.field(converter=mask_credentials)  # the text of --set may be an address
    layer: int = -1

    def kept_from(self, run: str) -> Origin:
        """The origin of a value that is kept from ``run``, where the experiment has "auto"."""
        return Origin(f"kept from {run}" + (f" [{self.text}]" if self.layer >= 0 else ""))


DEFAULT = Origin("default")


def add_places(error: NanochatError, origins: Mapping[str, Origin]) -> None:
    """Put file and line in front of the messages about each key of the experiment, in place."""
    error.add_places({key: origin.text for key, origin in origins.items() if origin.layer >= 0})
