"""Options of the optimizer ``muon_adamw``."""

from typing import Literal

import attrs

from nanochat_core import at_least, one_of, option

MOST_RATE = 1e6  # of learning rates and weight decays: beyond any that trains
POLAR_EXPRESS_STEPS = 5  # number of published coefficient triples


@attrs.frozen
class MuonAdamWConfig:
    """Options of ``muon_adamw``."""

    # learning rates
    matrix_lr: float = option(
        0.02, "Muon's learning rate, for the matrices of the blocks", validator=at_least(0, MOST_RATE)
    )
    embedding_lr: float = option(
        0.2,
        "AdamW's learning rate for the embedding at width 768; multiplied by (width / 768)^-0.5",
        validator=at_least(0, MOST_RATE),
    )
    value_embedding_lr: float | Literal["auto"] = option(
        "auto",
        'AdamW\'s learning rate for value embeddings at width 768, multiplied like embedding_lr; "auto": half of it',
        validator=at_least(0, MOST_RATE),
    )
    unembedding_lr: float = option(
        0.004,
        "AdamW's learning rate for the head at width 768; multiplied by (width / 768)^-0.5",
        validator=at_least(0, MOST_RATE),
    )
    scalar_lr: float = option(
        0.5,
        "AdamW's learning rate for scalars and vectors (x0 scalars too), at every width",
        validator=at_least(0, MOST_RATE),
    )
    residual_lr: float | Literal["auto"] = option(
        "auto",
        'AdamW\'s learning rate for the residual scalars; "auto": 0.01 x scalar_lr',
        validator=at_least(0, MOST_RATE),
    )
    smear_lr: float = option(0.2, "AdamW's learning rate for smear and backout", validator=at_least(0, MOST_RATE))
    lr_scale: float | Literal["auto"] = option(
        1.0,
        'factor on every learning rate but smear_lr; "auto": sqrt(total_batch_size / 2^19)',
        validator=at_least(0, MOST_RATE),
    )
    # decay
    matrix_weight_decay: float = option(0.0, "Muon's decoupled weight decay", validator=at_least(0, MOST_RATE))
    matrix_weight_decay_scale: float | Literal["auto"] = option(
        1.0,
        'factor on matrix_weight_decay; "auto": sqrt(total_batch_size / 2^19) x D12 / D, with D the tokens of the '
        "data : parameter ratio, D12 those of the reference model (depth 12)",
        validator=at_least(0, MOST_RATE),
    )
    matrix_weight_decay_schedule: Literal["constant", "cosine"] = option(
        "constant",
        'course of matrix_weight_decay; "cosine": it falls to 0 over the run',
        validator=one_of("constant", "cosine"),
    )
    cautious_weight_decay: bool = option(False, "decay matrices only where update and parameter agree in sign")
    weight_decay: float = option(
        0.0, "AdamW's decoupled weight decay, of embedding, value embeddings and head", validator=at_least(0, MOST_RATE)
    )
    embedding_weight_decay: float | Literal["auto"] = option(
        "auto", 'weight decay of the embedding; "auto": weight_decay', validator=at_least(0, MOST_RATE)
    )
    value_embedding_weight_decay: float | Literal["auto"] = option(
        "auto", 'weight decay of the value embeddings; "auto": weight_decay', validator=at_least(0, MOST_RATE)
    )
    unembedding_weight_decay: float | Literal["auto"] = option(
        "auto", 'weight decay of the head; "auto": weight_decay', validator=at_least(0, MOST_RATE)
    )
    residual_weight_decay: float = option(0.0, "weight decay of the residual scalars", validator=at_least(0, MOST_RATE))
    # AdamW
    adam_beta1: float = option(0.8, "AdamW's decay rate of the first moment", validator=at_least(0, below=1))
    adam_beta2: float = option(0.95, "AdamW's decay rate of the second moment", validator=at_least(0, below=1))
    embedding_beta2: float | Literal["auto"] = option(
        "auto", 'adam_beta2 of embedding and value embeddings; "auto": adam_beta2', validator=at_least(0, below=1)
    )
    unembedding_beta2: float | Literal["auto"] = option(
        "auto", 'adam_beta2 of the head; "auto": adam_beta2', validator=at_least(0, below=1)
    )
    x0_beta1: float | Literal["auto"] = option(
        "auto", 'adam_beta1 of the x0 scalars; "auto": adam_beta1', validator=at_least(0, below=1)
    )
    adam_eps: float = option(1e-10, "added to the square root of AdamW's second moment", validator=at_least(1e-30, 1))
    # Muon
    momentum: float = option(0.95, "Muon's momentum after its warmup", validator=at_least(0, below=1))
    momentum_start: float = option(
        0.85, "Muon's momentum at step 0, from which it rises linearly", validator=at_least(0, below=1)
    )
    momentum_warmup_steps: int = option(300, "steps from momentum_start to momentum", validator=at_least(0, 10**12))
    momentum_end: float | Literal["auto"] = option(
        "auto",
        'Muon\'s momentum at the end of the warmdown, changed linearly; "auto": momentum',
        validator=at_least(0, below=1),
    )
    row_equilibration: bool = option(False, "scale rows to the mean row norm before orthogonalization (MuonEq)")
    polar_express: bool = option(
        False, "use the coefficients of Polar Express, which differ per iteration, and not those of Newton-Schulz"
    )
    ns_steps: int = option(
        5, "iterations of orthogonalization; at most 5 with polar_express", validator=at_least(1, 50)
    )
    ns_dtype: Literal["auto", "bfloat16", "float32"] = option(
        "auto",
        'dtype of orthogonalization; "auto": bfloat16 where the hardware supports it, otherwise float32',
        validator=one_of("auto", "bfloat16", "float32"),
    )
    renormalize: bool = option(False, "set the Frobenius norm to sqrt(min(rows, columns)) after orthogonalization")
    variance_reduction: bool = option(
        False,
        "divide rows (columns of wide matrices) by the root of their second moment; the total norm is kept (NorMuon)",
    )
    variance_beta2: float = option(
        0.9, "decay rate of the second moment of variance_reduction", validator=at_least(0, below=1)
    )

    def __attrs_post_init__(self) -> None:
        if self.polar_express and self.ns_steps > POLAR_EXPRESS_STEPS:
            raise ValueError(
                f"ns_steps must be at most {POLAR_EXPRESS_STEPS} with polar_express, which has a triple of "
                f"coefficients for each iteration, not {self.ns_steps}"
            )
