"""Options of the logger ``csv``."""

from pathlib import Path

import attrs

from nanochat_core import option


@attrs.frozen
class CSVConfig:
    """Options of ``csv``."""

    directory: Path | None = option(
        None, "write to <directory>/<run name>/<run id>; default: csv/ in the run's directory"
    )
