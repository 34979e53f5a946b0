"""Options of the model and of the tokenizer ``hf``."""

import attrs

from nanochat_core import option


@attrs.frozen
class HFConfig:
    path: str = option(help="a directory that transformers can load, or a name on the Hugging Face hub")
    gguf_file: str | None = option(None, "file in it, when the weights are a GGUF")
    revision: str | None = option(None, "branch, tag or commit of a hub name")
