"""Options of the logger ``console``."""

from typing import Literal

import attrs

from nanochat_core import at_least, option


@attrs.frozen
class ConsoleConfig:
    """Options of ``console``."""

    log_every: int = option(
        1, "steps between printed lines; the last step is always printed", validator=at_least(1, 10**12)
    )
    progress: bool | Literal["auto"] = option("auto", "show a progress bar; auto: on a terminal, not in a pipe")
