"""Formatting of ledger records as lines of text."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Mapping

from nanochat_core import metrics_and_texts

Record = Mapping[str, float | str]

_PARTS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("train/loss", lambda v: f"loss: {v:.6f}"),
    ("train/grad_norm", lambda v: f"grad norm: {v:.4f}"),
    ("train/lrm", lambda v: f"lrm: {v:.2f}"),
    ("train/dt", lambda v: f"dt: {v * 1000:.2f}ms"),
    ("train/tok_per_sec", lambda v: f"tok/sec: {v:,.0f}"),
    ("train/mfu", lambda v: f"mfu: {v:.2f}"),
    ("total_training_time", lambda v: f"total time: {v / 60:.2f}m"),
    ("eta", lambda v: f"eta: {v / 60:.1f}m"),
)


def step_line(step: int, num_iterations: int, values: Mapping[str, float]) -> str:
    """Format the line of one optimizer step. Missing values are left out.

    Args:
        step: optimizer steps done before this one.
        values: by metric name; ``total_training_time`` and ``eta`` in seconds.
    """
    parts = [f"step {step:05d}/{num_iterations:05d} ({100 * step / max(num_iterations, 1):.2f}%)"]
    parts += [show(values[name]) for name, show in _PARTS if name in values]
    if values.get("train/epoch", 0) >= 1:
        parts.append(f"epoch: {values['train/epoch']:.0f}")
    return " | ".join(parts)


def evaluation_lines(record: Record) -> Iterator[str]:
    """Format a record that is not one of an optimizer step: metrics first, then texts, indented."""
    step = f"Step {int(record['step']):05d}"
    numbers, texts = metrics_and_texts(record)
    tasks = []
    for name, value in numbers.items():
        if name == "val/bpb":
            yield f"{step} | Validation bpb: {value:.4f}"
        elif name == "core_metric":
            yield f"{step} | CORE metric: {value:.4f}"
        elif name.startswith("core/"):
            tasks.append(f"{name.removeprefix('core/')} {_number(value)}")
        else:
            yield f"{step} | {name}: {_number(value)}"
    if tasks:
        yield f"{step} | CORE tasks: {', '.join(tasks)}"
    group = ""
    for name, text in texts.items():
        before, _, last = name.rpartition("/")
        if before != group or not before:
            yield f"{step} | {before or last}:"
            group = before
        # A model's text may hold control codes, which a terminal would execute.
        shown = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
        yield textwrap.indent(shown.rstrip(), "    ")


def _number(value: float) -> str:
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and abs(value) >= 1000):
        return f"{value:.0f}"
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.4g}"
