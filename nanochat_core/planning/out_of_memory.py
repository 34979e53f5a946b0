"""The error for a device that runs out of memory, with its remedies."""

from __future__ import annotations

from nanochat_core.errors import NanochatError
from nanochat_core.planning.plan import Plan


class OutOfMemory(NanochatError):
    """Error: a device does not have enough memory for the run. Its exit code is 4.

    Args:
        plan: the plan of the run.
        doing: the activity during which memory ran out, such as "training step 7".
        said: the message of torch.
    """

    exit_code = 4

    def __init__(self, plan: Plan, doing: str, said: str = "") -> None:
        parts = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in plan.memory.items())
        again = "" if plan.activation_checkpointing else ", then set train.activation_checkpointing = true"
        rows = plan.device_batch_size
        lower = f"lower train.device_batch_size, now {rows} (the total batch size stays the same)" if rows > 1 else ""
        remedy = f"{lower}{again}".removeprefix(", then ") or "use a smaller model or a smaller train.max_seq_len"
        estimate = f"the estimate was {sum(plan.memory.values()) / 2**20:,.0f} MiB per device ({parts})"
        first = said.strip().partition("\n")[0]
        super().__init__(f"out of memory while {doing}; {estimate}. {remedy[0].upper()}{remedy[1:]}. {first}".rstrip())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch means that a device or the machine has no memory left."""
    known = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in known)
