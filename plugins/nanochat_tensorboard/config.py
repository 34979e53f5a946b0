"""Options of the logger ``tensorboard``."""

from pathlib import Path

import attrs

from nanochat_core import above, option


@attrs.frozen
class TensorBoardConfig:
    directory: Path | None = option(
        None, "write to <directory>/<run name>/<run id>; absent: to tensorboard/ in the run's directory"
    )
    flush_seconds: float = option(10.0, "events reach the disk at the latest after so many seconds", validator=above(0))
