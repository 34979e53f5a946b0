"""Options of the logger ``aim``."""

import attrs

from nanochat_core import option


@attrs.frozen
class AimConfig:
    """Options of ``aim``."""

    repo: str | None = option(
        None, "directory of the Aim repository, or aim://host:port of a server; default: the directory of all runs"
    )
    system_metrics: bool = option(True, "log CPU, memory and GPU of the machine")
