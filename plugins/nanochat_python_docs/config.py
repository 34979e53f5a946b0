"""Options of the data source ``python_docs``."""

import attrs

from nanochat_core import between, option


@attrs.frozen
class PythonDocsConfig:
    """Language reference and docstrings of the standard library of the Python that runs."""

    source: bool = option(False, "add the source text of the library, several times as much")
    val_fraction: float = option(
        0.05, "share of modules and topics held out for validation", validator=between(0.01, 0.5)
    )
