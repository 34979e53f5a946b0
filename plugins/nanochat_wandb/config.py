"""Options of the logger ``wandb``."""

from typing import Literal

import attrs

from nanochat_core import above, option


@attrs.frozen
class WandbConfig:
    """Options of ``wandb``."""

    mode: Literal["auto", "online", "offline"] = option(
        "auto", "auto: online when there is a key and the server answers, otherwise offline, for wandb sync"
    )
    entity: str | None = option(None, "user or team that owns the run; default: that of your account")
    init_timeout: float = option(30.0, "seconds within which the server must accept the run", validator=above(0, 10**6))
    finish_timeout: float = option(
        40.0, "seconds that the rest of the upload may take at the end", validator=above(0, 10**6)
    )
    system_metrics: bool = option(True, "log CPU, memory, disk, network and GPU of the machine")
