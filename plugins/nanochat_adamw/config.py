"""Options of the optimizer ``adamw``."""

from typing import Literal

import attrs

from nanochat_core import at_least, option

MOST_RATE = 1e6  # of learning rates and weight decays: beyond any that trains


@attrs.frozen
class AdamWConfig:
    """Options of ``adamw``."""

    lr: float = option(2e-3, "learning rate", validator=at_least(0, MOST_RATE))
    embedding_lr: float | Literal["auto"] = option(
        "auto", 'learning rate of the embedding; "auto": lr', validator=at_least(0, MOST_RATE)
    )
    unembedding_lr: float | Literal["auto"] = option(
        "auto", 'learning rate of the head; "auto": lr', validator=at_least(0, MOST_RATE)
    )
    weight_decay: float = option(0.1, "decoupled weight decay of matrices and head", validator=at_least(0, MOST_RATE))
    beta1: float = option(0.9, "decay rate of the first moment", validator=at_least(0, below=1))
    beta2: float = option(0.95, "decay rate of the second moment", validator=at_least(0, below=1))
    eps: float = option(1e-8, "added to the square root of the second moment", validator=at_least(1e-30, 1))
