"""Options of the tokenizer ``bytes``."""

import attrs


@attrs.frozen
class BytesConfig:
    """Options of ``bytes``: there are none; it always has 265 tokens."""
