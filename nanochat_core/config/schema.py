"""An experiment: attrs classes of the core's tables, and the choices of plugins."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import attrs

from nanochat_core.plugins.choice import MOST_STEPS, Choice
from nanochat_core.plugins.options import above, at_least, between, file_name, one_line, option

MOST_TOKENS = 2**40  # in an optimizer step: no batch is that large, and its divisors are found at once

# ------------------------------------------------------------------------------------------- tables of the core


@attrs.frozen
class Run:
    name: str = option(
        "",
        "name of the experiment and of its directory; default: the file's name",
        validator=file_name,
        on_resume="refuse",
    )
    project: str = option("nanochat", "project that loggers file the run under", validator=one_line)
    group: str = option("", "group of runs that belong together, such as the arms of an ablation", validator=one_line)
    tags: tuple[str, ...] = option((), "tags for loggers", validator=one_line)
    share_environment: bool = option(
        False,
        "let loggers tell their services the host name, git remote, command and list of packages of this machine",
        on_resume="free",
    )


@attrs.frozen
class Schedule:
    warmup_ratio: float | None = option(
        None,
        "fraction of the run over which the learning rate rises linearly; or give warmup_steps",
        validator=between(0, 1),
    )
    warmup_steps: int | None = option(
        None, "length of the warmup in optimizer steps; or give warmup_ratio", validator=at_least(0, MOST_STEPS)
    )
    warmdown_ratio: float = option(
        0.2, "fraction of the run, at its end, over which the learning rate falls linearly", validator=between(0, 1)
    )
    final_lr_frac: float = option(
        0.0, "learning rate at the very end, as a fraction of the full one", validator=between(0, 1)
    )


@attrs.frozen
class Train:
    max_seq_len: int = option(2048, "context length T, in tokens", validator=at_least(1, 2**24), on_resume="refuse")
    device_batch_size: int | Literal["auto"] = option(
        32,
        "sequences per device and micro-batch: lower it when memory runs out; auto: the largest that fits",
        validator=at_least(1, 2**24),
        on_resume="free",
    )
    total_batch_size: int | Literal["auto"] = option(
        524288,
        "tokens per optimizer step, all devices; auto: 2^19 (D / D12)^0.383 to the nearest power of two",
        validator=at_least(1, MOST_TOKENS),
        on_resume="refuse",
    )
    num_iterations: int | None = option(None, "horizon: optimizer steps", validator=at_least(1, MOST_STEPS))
    target_flops: float | None = option(None, "horizon: FLOPs of the whole training", validator=above(0, 1e29))
    target_param_data_ratio: float | None = option(
        None, "horizon: training tokens per parameter; 20 when no horizon is given", validator=above(0, 1e9)
    )
    scaling_parameters: Literal["all", "matrix_and_head"] = option(
        "all", "which parameters the ratio and the auto batch size count"
    )
    grad_clip: float = option(
        1.0, "largest global gradient norm; 0 is off", validator=at_least(0, 1e9), on_resume="warn"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "dtype of matrix products; auto: bfloat16 where the hardware accelerates it, else float16 on CUDA devices "
        "that accelerate that. Gradients of float16 are kept in range by a loss scale",
        on_resume="refuse",
    )
    compile: bool | Literal["auto"] = option("auto", "torch.compile; auto: when the run is long enough to earn it back")
    activation_checkpointing: bool = option(
        False,
        "keep only the input of each block and recompute the rest in the backward pass: less memory, more time",
    )
    profile: int = option(
        0,
        "optimizer steps to trace once training has settled, which slows them; the trace is in profile/ of the "
        "run directory; 0 is off",
        validator=at_least(0, 1000),
        unverified="kernels of a CUDA device were never traced",
    )
    max_skipped_steps: int = option(
        10,
        "steps in a row with a loss or gradient that is not finite before the run stops",
        validator=at_least(0, MOST_STEPS),
    )
    stall_warning: float = option(
        300.0,
        "seconds without progress after which a stall is reported, with where each rank is; inf is off",
        validator=above(0, math.inf),
        on_resume="free",
    )
    deterministic: bool = option(
        False,
        "use only algorithms that are reproducible bit for bit, which are slower on CUDA; an operation without one "
        "is an error. A CPU is reproducible without it",
        on_resume="warn",
        unverified="it never ran on a CUDA device",
    )
    seed: int = option(1337, "seed of the initial weights", validator=between(0, 2**63 - 1), on_resume="refuse")
    init_from: str | None = option(None, "start from the newest checkpoint of this run", on_resume="refuse")


@attrs.frozen
class Checkpoint:
    save_every: int | None = option(
        None, "optimizer steps between checkpoints; the last step is always saved", validator=at_least(1, MOST_STEPS)
    )
    asynchronous: bool = option(
        False,
        "write checkpoints in the background: training waits only for the copy off the device, and for the "
        "save before, if that is still being written",
    )
    keep_last: int | None = option(
        None,
        "number of newest checkpoints to keep; without any keep_ option all are kept; with one, the newest and "
        "those that any of them keeps",
        validator=at_least(1, MOST_STEPS),
    )
    keep_every: int | None = option(
        None, "keep checkpoints of steps that are a multiple of this", validator=at_least(1, MOST_STEPS)
    )
    keep_best: int | None = option(
        None,
        "number of checkpoints to keep that are best by best_metric, among those evaluated at their own step",
        validator=at_least(1, MOST_STEPS),
    )
    best_metric: str | None = option(
        None,
        "metric of keep_best, by its name in the ledger; default: that of the first evaluator that has one",
        validator=one_line,
    )
    best_is: Literal["smallest", "largest"] = option("smallest", "which value of best_metric is best")

    def __attrs_post_init__(self) -> None:
        if self.save_every is not None and self.keep_every is not None and self.keep_every % self.save_every:
            raise ValueError(
                f"keep_every must be a multiple of save_every, {self.save_every}, not {self.keep_every}: other steps "
                f"have no checkpoint"
            )


HORIZONS = ("num_iterations", "target_flops", "target_param_data_ratio")
WARMUPS = ("warmup_ratio", "warmup_steps")

# -------------------------------------------------------------------------------------------- what plugins fill


@attrs.frozen
class Experiment:
    """A whole experiment: frozen, plain data."""

    run: Run
    tokenizer: Choice
    data: Choice
    model: Choice
    optimizer: Choice
    schedule: Schedule
    train: Train
    checkpoint: Checkpoint
    evaluators: tuple[Choice, ...]
    loggers: tuple[Choice, ...]

    def packages(self) -> set[str]:
        """Top-level modules of its plugins."""
        choices = (self.tokenizer, self.data, self.model, self.optimizer, *self.evaluators, *self.loggers)
        return {choice.entry.factory.split(".")[0].split(":")[0] for choice in choices if choice.entry is not None}


CORE_TABLES: Mapping[str, type] = {"run": Run, "schedule": Schedule, "train": Train, "checkpoint": Checkpoint}
TABLES = ("run", "tokenizer", "data", "model", "optimizer", "schedule", "train", "checkpoint", "evaluators", "loggers")

# ------------------------------------------------------------------------------------------ strict structuring
