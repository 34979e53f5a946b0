"""The plan of a run as text for people."""

from __future__ import annotations

from nanochat_core.planning.plan import Planned


def format_plan(planned: Planned) -> str:
    """Format a plan as lines of a name and a value, as ``plan`` and ``run`` print it."""
    plan = planned.plan

    def count(n: int) -> str:
        return f"{n:,}"

    counts = plan.parameter_counts
    tokens_micro = plan.device_batch_size * plan.max_seq_len
    rows: list[tuple[str, str]] = [
        ("device", f"{plan.world_size} x {plan.device}, {plan.dtype}{', compiled' * plan.compile}")
    ]
    rows.append(("vocab size", count(plan.vocab_size)))
    rows += [(name, count(v) if isinstance(v, int) else v) for name, v in plan.description.items()]
    by_role = ", ".join(f"{role} {count(n)}" for role, n in counts.items() if role != "total")
    rows.append(("parameters", f"{count(counts['total'])} ({by_role})"))
    rows.append(("FLOPs per token", f"{plan.flops_per_token:.4e}"))
    rows.append(
        ("micro-batch per rank", f"{plan.device_batch_size} x {plan.max_seq_len} = {count(tokens_micro)} tokens")
    )
    rows.append(("total batch size", f"{count(plan.total_batch_size)} tokens per step"))
    rows.append(("accumulation steps", count(plan.accumulation_steps)))
    rows.append(("steps", f"{count(plan.num_iterations)} ({plan.horizon})"))
    rows.append(("schedule", f"warmup {plan.warmup_steps}, warmdown {plan.warmdown_steps} steps"))
    ratio = plan.total_tokens / plan.scaling_parameters
    rows.append(("tokens", f"{count(plan.total_tokens)}, tokens : params ratio {ratio:.2f}"))
    rows.append(("total FLOPs", f"{plan.total_flops:.4e}"))
    parts = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in plan.memory.items())
    known = "activations" in plan.memory
    total = sum(plan.memory.values())
    estimate = f"about {total / 2**20:,.0f} MiB per device ({parts})"
    if total > plan.room:
        estimate += f", more than the {plan.room / 2**20:,.0f} MiB available for training"
    rows.append(("memory", estimate if known else f"{estimate}; activations unknown for this model"))
    rows += [("unverified", f"{key}: {note}") for key, note in planned.unverified.items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)
