"""Options of the logger ``wandb``."""

from typing import Literal

import attrs

from nanochat_core import above, option


@attrs.frozen
class WandbConfig:
    mode: Literal["auto", "online", "offline"] = option(
        "auto", "auto: online when there is a key and the server answers, else offline, to be sent with wandb sync"
    )
    entity: str | None = option(None, "user or team to file the run under; absent: your default")
    init_timeout: float = option(30.0, "seconds that the server has to accept the run", validator=above(0))
    finish_timeout: float = option(40.0, "seconds that uploading the rest may take at the end", validator=above(0))
    system_metrics: bool = option(True, "log CPU, memory, disk, network and GPU of the machine")
