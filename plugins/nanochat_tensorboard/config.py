"""Options of the logger ``tensorboard``."""

from pathlib import Path

import attrs

from nanochat_core import above, option


@attrs.frozen
class TensorBoardConfig:
    """Options of ``tensorboard``."""

    directory: Path | None = option(
        None, "write to <directory>/<run name>/<run id>; default: tensorboard/ in the run's directory"
    )
    flush_seconds: float = option(
        10.0, "seconds after which events are on the disk at the latest", validator=above(0, 10**6)
    )
