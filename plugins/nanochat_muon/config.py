"""Options of the optimizer ``muon_adamw``."""

from typing import Literal

import attrs

from nanochat_core import above, at_least, between, one_of, option


@attrs.frozen
class MuonAdamWConfig:
    matrix_lr: float = option(0.02, "Muon's learning rate, for the matrices of the blocks", validator=at_least(0))
    embedding_lr: float = option(
        0.2, "AdamW's for the embedding, at width 768: times (width / 768)^-0.5", validator=at_least(0)
    )
    unembedding_lr: float = option(
        0.004, "AdamW's for the head, at width 768: times (width / 768)^-0.5", validator=at_least(0)
    )
    scalar_lr: float = option(0.5, "AdamW's for scalars and vectors, whatever the width", validator=at_least(0))
    weight_decay: float = option(0.0, "AdamW's decoupled decay, on embedding and head", validator=at_least(0))
    matrix_weight_decay: float = option(0.0, "Muon's decoupled decay", validator=at_least(0))
    adam_beta1: float = option(0.8, "AdamW's decay of the first moment", validator=between(0, 1))
    adam_beta2: float = option(0.95, "AdamW's decay of the second moment", validator=between(0, 1))
    adam_eps: float = option(1e-10, "added to the root of AdamW's second moment", validator=above(0))
    momentum: float = option(0.95, "Muon's momentum after its warmup", validator=between(0, 1))
    momentum_start: float = option(0.85, "Muon's momentum at step 0; rises linearly", validator=between(0, 1))
    momentum_warmup_steps: int = option(300, "steps of that rise", validator=at_least(0))
    ns_steps: int = option(5, "Newton-Schulz iterations", validator=at_least(1))
    ns_dtype: Literal["auto", "bfloat16", "float32"] = option(
        "auto",
        'what Newton-Schulz computes in; "auto": bfloat16 where the hardware has it, float32 else',
        validator=one_of("auto", "bfloat16", "float32"),
    )
