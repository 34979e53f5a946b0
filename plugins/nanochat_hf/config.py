"""Options of the model and of the tokenizer ``hf``."""

import attrs

from nanochat_core import option


@attrs.frozen
class HFConfig:
    """Options of the model and of the tokenizer ``hf``."""

    path: str = option(help="a directory that transformers can load, or a name on the Hugging Face hub")
    gguf_file: str | None = option(None, "GGUF file in it, if the weights are in one")
    revision: str | None = option(None, "branch, tag or commit on the hub")
