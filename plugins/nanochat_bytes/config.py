"""Options of the tokenizer ``bytes``."""

import attrs


@attrs.frozen
class BytesConfig:
    """Nothing to choose: always 265 tokens."""
