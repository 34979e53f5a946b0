"""Options of the optimizer ``muon_adamw``."""

from typing import Literal

import attrs

from nanochat_core import above, at_least, between, one_of, option

POLAR_EXPRESS_STEPS = 5  # as many as there are published coefficients


@attrs.frozen
class MuonAdamWConfig:
    # learning rates
    matrix_lr: float = option(0.02, "Muon's learning rate, for the matrices of the blocks", validator=at_least(0))
    embedding_lr: float = option(
        0.2, "AdamW's for the embedding, at width 768: times (width / 768)^-0.5", validator=at_least(0)
    )
    value_embedding_lr: float | Literal["auto"] = option(
        "auto", 'the same for value embeddings; "auto": half of embedding_lr', validator=at_least(0)
    )
    unembedding_lr: float = option(
        0.004, "AdamW's for the head, at width 768: times (width / 768)^-0.5", validator=at_least(0)
    )
    scalar_lr: float = option(
        0.5, "AdamW's for scalars and vectors (x0 scalars too), whatever the width", validator=at_least(0)
    )
    residual_lr: float | Literal["auto"] = option(
        "auto", 'AdamW\'s for the residual scalars; "auto": 0.01 x scalar_lr', validator=at_least(0)
    )
    smear_lr: float = option(0.2, "AdamW's for smear and backout", validator=at_least(0))
    lr_scale: float | Literal["auto"] = option(
        1.0,
        'factor on every learning rate but smear_lr; "auto": sqrt(total_batch_size / 2^19)',
        validator=at_least(0),
    )
    # decay
    matrix_weight_decay: float = option(0.0, "Muon's decoupled decay", validator=at_least(0))
    matrix_weight_decay_scale: float | Literal["auto"] = option(
        1.0,
        'factor on it; "auto": sqrt(total_batch_size / 2^19) x D12 / D, D the tokens that the data : parameter ratio '
        "asks for, D12 those for the reference model (depth 12)",
        validator=at_least(0),
    )
    matrix_weight_decay_schedule: Literal["constant", "cosine"] = option(
        "constant", '"cosine": it falls to 0 over the run', validator=one_of("constant", "cosine")
    )
    cautious_weight_decay: bool = option(False, "matrices decay only where update and parameter agree in sign")
    weight_decay: float = option(
        0.0, "AdamW's decoupled decay, on embedding, value embeddings and head", validator=at_least(0)
    )
    embedding_weight_decay: float | Literal["auto"] = option(
        "auto", 'the embedding\'s; "auto": weight_decay', validator=at_least(0)
    )
    value_embedding_weight_decay: float | Literal["auto"] = option(
        "auto", 'the value embeddings\'; "auto": weight_decay', validator=at_least(0)
    )
    unembedding_weight_decay: float | Literal["auto"] = option(
        "auto", 'the head\'s; "auto": weight_decay', validator=at_least(0)
    )
    residual_weight_decay: float = option(0.0, "the residual scalars'", validator=at_least(0))
    # AdamW
    adam_beta1: float = option(0.8, "AdamW's decay of the first moment", validator=between(0, 1))
    adam_beta2: float = option(0.95, "AdamW's decay of the second moment", validator=between(0, 1))
    embedding_beta2: float | Literal["auto"] = option(
        "auto", 'that of embedding and value embeddings; "auto": adam_beta2', validator=between(0, 1)
    )
    unembedding_beta2: float | Literal["auto"] = option(
        "auto", 'that of the head; "auto": adam_beta2', validator=between(0, 1)
    )
    x0_beta1: float | Literal["auto"] = option(
        "auto", 'first moment of the x0 scalars; "auto": adam_beta1', validator=between(0, 1)
    )
    adam_eps: float = option(1e-10, "added to the root of AdamW's second moment", validator=above(0))
    # Muon
    momentum: float = option(0.95, "Muon's momentum after its warmup", validator=between(0, 1))
    momentum_start: float = option(0.85, "Muon's momentum at step 0; rises linearly", validator=between(0, 1))
    momentum_warmup_steps: int = option(300, "steps of that rise", validator=at_least(0))
    momentum_end: float | Literal["auto"] = option(
        "auto", 'reached at the end of the warmdown, linearly; "auto": momentum, no change', validator=between(0, 1)
    )
    row_equilibration: bool = option(False, "rows rescaled to the mean row norm before orthogonalisation (MuonEq)")
    polar_express: bool = option(
        False, "Polar Express coefficients, one triple an iteration, instead of Newton-Schulz's one for all"
    )
    ns_steps: int = option(
        5, "iterations of either; Polar Express has 5, and fewer are its first ones", validator=at_least(1)
    )
    ns_dtype: Literal["auto", "bfloat16", "float32"] = option(
        "auto",
        'what they compute in; "auto": bfloat16 where the hardware has it, float32 else',
        validator=one_of("auto", "bfloat16", "float32"),
    )
    renormalize: bool = option(False, "Frobenius norm set to sqrt(min(rows, columns)) after orthogonalisation")
    variance_reduction: bool = option(
        False, "rows (columns of wide matrices) divided by the root of their second moment, total norm kept (NorMuon)"
    )
    variance_beta2: float = option(0.9, "decay of that second moment", validator=between(0, 1))

    def __attrs_post_init__(self) -> None:
        if self.polar_express and self.ns_steps > POLAR_EXPRESS_STEPS:
            raise ValueError(
                f"ns_steps must be at most {POLAR_EXPRESS_STEPS} with polar_express, which has a triple of "
                f"coefficients for each step, not {self.ns_steps}"
            )
