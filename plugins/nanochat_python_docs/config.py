"""Options of the data source ``python_docs``."""

import attrs

from nanochat_core import between, option


@attrs.frozen
class PythonDocsConfig:
    """Options of ``python_docs``: language reference and docstrings of the standard library of the running Python."""

    source: bool = option(False, "add the source code of the library, which is several times as much text")
    val_fraction: float = option(
        0.05, "share of modules and topics held out for validation", validator=between(0.01, 0.5)
    )
