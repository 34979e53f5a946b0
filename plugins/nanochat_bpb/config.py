"""Options of the evaluator ``bpb``."""

from typing import Literal

import attrs

from nanochat_core import at_least, option


@attrs.frozen
class BpbConfig:
    eval_tokens: int = option(
        20 * 524288, "how many tokens of the split to look at; fewer if it has fewer", validator=at_least(1)
    )
    split: Literal["val", "train"] = option("val", "which documents; the metric is named <split>/bpb")
