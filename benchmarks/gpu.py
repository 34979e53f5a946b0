"""All measurements on one CUDA GPU in one command. Unverified: it has not run on a GPU yet.

    python benchmarks/gpu.py                      # writes gpu-report/report.md and .json
    python benchmarks/gpu.py --depths 12 --kinds train attention
    python benchmarks/gpu.py --smoke              # tiny shapes, on any machine, to test the script

Training steps of experiments/dN.toml (classic) and experiments/speedrun.toml at depths 12 and 20, T = 2048, 2^19 tokens
per step, in bfloat16 and with model.fp8 = true, with each attention backend; attention alone, forward and backward,
over all earlier tokens and over a window; and a profile of a step. Each measurement runs in its own process. If a
library is missing or a measurement fails, its row has the error; when memory runs out, the rows per device batch are
halved. A repeated start continues after the last result in --out.

MFU is the model's FLOPs (6 per parameter and token, and those of attention, as `nanochat show` prints) over the
device's dense bfloat16 peak, for fp8 too. Without a GPU the exit code is 2.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

JOB_SECONDS = 900
BACKENDS = ("sdpa", "flex", "flash3")
KERNELS = (
    ("attention", r"flash|fmha|attention|flex|sdpa"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|mm\b|matmul|cublas"),
    ("fused by Inductor", r"triton"),
    ("memory", r"copy|memcpy|memset|fill|cat"),
)

Row = dict[str, Any]


# -------------------------------------------------------------------------------------- jobs, each in its own process


def machine(job: Row) -> Row:
    import torch

    from nanochat_core.hardware.machine import device_name, peak_flops, pick_device

    device = pick_device(0)
    peak, how = peak_flops(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    row = {"device": device.type, "name": device_name(device), "torch": torch.__version__, "peak": peak, "how": how}
    if device.type == "cuda":
        row["memory"] = torch.cuda.get_device_properties(device).total_memory / 2**30
        row["cuda"] = torch.version.cuda
    return row


def open_training(job: Row) -> Any:
    from training import EXPERIMENTS, Training

    from nanochat_core.hardware.machine import pick_device

    file = EXPERIMENTS / ("speedrun.toml" if job["recipe"] == "speedrun" else f"d{job['depth']}.toml")
    file = file if file.exists() or job["recipe"] == "speedrun" else EXPERIMENTS / "classic.toml"
    overrides = {
        "model.depth": job["depth"],
        "train.max_seq_len": job["T"],
        "train.device_batch_size": job["batch"],
        "train.total_batch_size": job["tokens"],
        "train.num_iterations": 10000,
        "train.dtype": job["dtype"],
        "train.compile": job["compile"],
        "tokenizer.vocab_size": job["vocab"],
    }
    # Only values that differ from the default: an older model plugin may lack the option.
    if job["attention"] != "auto":
        overrides["model.attention"] = job["attention"]
    if job["fp8"] or job["recipe"] == "speedrun":
        overrides["model.fp8"] = job["fp8"]
    texts = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    return Training(file, texts, pick_device(0))


def train(job: Row) -> Row:
    """Measure training steps; times are medians of complete steps."""
    from nanochat_core.hardware.machine import peak_flops, peak_memory_mib

    start = time.perf_counter()
    training = open_training(job)
    ids, targets = training.batch()
    losses = [training.step(ids, targets)]
    first = time.perf_counter() - start
    losses.append(training.step(ids, targets))
    seconds = []
    for _ in range(job["steps"]):
        start = time.perf_counter()
        losses.append(training.step(ids, targets))  # waits for the loss
        synchronize(training.device)
        seconds.append(time.perf_counter() - start)
    rate = job["tokens"] / statistics.median(seconds)
    peak, _ = peak_flops(training.device, training.dtype)
    return {
        "tokens/s": rate,
        "mfu": rate * training.plan.flops_per_token / peak,
        "memory": peak_memory_mib(training.device),
        "first": first,
        "losses": [losses[0], losses[-1]],
        "parameters": training.plan.parameter_counts["total"],
    }


def attention(job: Row) -> Row:
    """Measure milliseconds of forward and backward, over all earlier tokens and over a window."""
    import torch

    from nanochat_core.hardware.machine import pick_device
    from nanochat_gpt.attention import attend, make_masking
    from nanochat_gpt.cache import Past

    device, dtype, T = pick_device(0), getattr(torch, job["dtype"]), job["T"]
    shape = (job["heads"], job["batch"], T, job["head_dim"])
    q, k, v, dy = (torch.randn(shape, device=device, dtype=dtype, requires_grad=i < 3) for i in range(4))
    row: Row = {}
    for name, window in (("full ms", None), ("window ms", job["window"])):
        masking = make_masking(job["backend"], window, T, Past(), True, dtype, device)

        def once(masking: Any = masking) -> None:
            torch.autograd.grad(attend(q, k, v, masking), (q, k, v), dy)

        row[name] = 1000 * median_seconds(once, device, job["repeats"])
    return {**row, "ratio": row["window ms"] / row["full ms"]}


def profile(job: Row) -> Row:
    """Profile a step by kernel (on a CPU by operation), and time micro-batches and the rest of the step."""
    import torch
    from torch.profiler import ProfilerActivity

    training = open_training(job)
    cuda = training.device.type == "cuda"
    ids, targets = training.batch()
    for _ in range(2):
        training.step(ids, targets)

    def micro_batch() -> None:
        training.forward_backward(ids[: job["batch"]], targets[: job["batch"]])

    forward_backward = median_seconds(micro_batch, training.device, 5)
    training.optimizer.discard()
    step = median_seconds(lambda: training.step(ids, targets), training.device, 3)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as profiler:
        start = time.perf_counter()
        training.step(ids, targets)
        synchronize(training.device)
        wall = time.perf_counter() - start
    events = [e for e in profiler.key_averages() if not getattr(e, "is_user_annotation", False)]
    events = [e for e in events if not cuda or e.device_type == torch.autograd.DeviceType.CUDA]
    times = [(e.key, e.count, (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1000) for e in events]
    times = sorted((t for t in times if t[2] > 0 and "ProfilerStep" not in t[0]), key=lambda t: -t[2])
    groups: dict[str, float] = {}
    for name, _, ms in times:
        group = next((g for g, pattern in KERNELS if re.search(pattern, name, re.IGNORECASE)), "other")
        groups[group] = groups.get(group, 0.0) + ms
    accumulation = training.plan.accumulation_steps
    return {
        "step ms": 1000 * step,
        "micro-batch ms": 1000 * forward_backward,
        "rest ms": 1000 * (step - accumulation * forward_backward),
        "micro-batches": accumulation,
        "profiled ms": 1000 * wall,
        "busy ms": sum(ms for _, _, ms in times),
        "groups": groups,
        "kernels": times[:25],
    }


def synchronize(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(once: Callable[[], object], device: Any, repeats: int) -> float:
    for _ in range(3):
        once()
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        once()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


KINDS: dict[str, Callable[[Row], Row]] = {
    "machine": machine,
    "train": train,
    "attention": attention,
    "profile": profile,
}


def print_result(job: Row) -> None:
    """Print the result of a job as the last line, a JSON object; ``{"oom": true}`` when memory ran out."""
    try:
        row = KINDS[job["kind"]](job)
    except RuntimeError as error:
        if not re.search("out of memory|allocate memory|ALLOC_FAILED", str(error)):
            raise
        row = {"oom": True}
    print(json.dumps(row), flush=True)


# ------------------------------------------------------------------------------------------------ list of measurements


def jobs(options: argparse.Namespace) -> list[Row]:
    experiments = Path(__file__).parents[1] / "experiments"
    recipes = ["classic"] + ["speedrun"] * (experiments / "speedrun.toml").exists()
    common: Row = {"T": 2048, "tokens": 2**19, "batch": 32, "steps": 3, "vocab": 32768}
    common |= {"dtype": "bfloat16", "compile": True, "fp8": False, "attention": "auto"}
    if options.smoke:
        common |= {"T": 64, "tokens": 256, "batch": 4, "steps": 2, "vocab": 320, "dtype": "float32", "compile": False}
        common |= {"depth": 1, "recipe": "classic"}
        small = {"backend": "sdpa", "T": 128, "window": 32, "heads": 1, "batch": 1, "head_dim": 32, "repeats": 3}
        return [
            {"kind": "train", **common},
            {"kind": "train", **common, "attention": "flash3"},  # fails on a CPU, which gives a row with an error
            {"kind": "attention", "dtype": "float32", **small},
            {"kind": "profile", **common},
        ]
    selected: list[Row] = []
    for depth, recipe in itertools.product(options.depths, recipes):
        arm = {"kind": "train", **common, "depth": depth, "recipe": recipe}
        selected += [arm, {**arm, "fp8": True}]
        selected += [{**arm, "attention": backend} for backend in BACKENDS]
    for backend in BACKENDS:
        shape = {"T": 4096, "window": 1024, "heads": 10, "batch": 4, "head_dim": 128, "repeats": 20}
        selected.append({"kind": "attention", "dtype": "bfloat16", "backend": backend, **shape})
    for recipe in recipes:
        selected.append({"kind": "profile", **common, "depth": max(options.depths), "recipe": recipe})
    return [job for job in selected if job["kind"] in options.kinds]


def run_job(job: Row) -> Row:
    """Run a job in its own process, with half the batch as long as memory runs out. Returns the job with its result."""
    while True:
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        command = [sys.executable, __file__, "--job", json.dumps(job)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=JOB_SECONDS)
        except subprocess.TimeoutExpired:
            return {**job, "error": f"not finished after {JOB_SECONDS} s"}
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
            return {**job, "error": lines[-1].strip(), "trace": done.stderr[-4000:]}
        row: Row = {**job, **json.loads(done.stdout.splitlines()[-1])}
        if not row.pop("oom", False):
            return row
        if job["batch"] == 1:
            return {**job, "error": "out of memory with one row"}
        job = {**job, "batch": job["batch"] // 2}


# ------------------------------------------------------------------------------------------------------------- report


def report(machine: Row, rows: list[Row]) -> str:
    """The report in Markdown."""
    text = ["# nanochat on one GPU", "", machine_line(machine), ""]
    by_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in KINDS}
    if by_kind["train"]:
        row = by_kind["train"][0]
        text += [f"## Training steps, T = {row['T']}, {row['tokens']:,} tokens per step", ""]
        text += table(
            ("recipe", "depth", "precision", "attention", "rows", "tokens/s", "MFU", "peak MiB", "first step s"),
            [train_cells(row) for row in by_kind["train"]],
        )
    if by_kind["attention"]:
        row = by_kind["attention"][0]
        shape = f"{row['batch']} rows, {row['heads']} heads of {row['head_dim']}, {row['dtype']}"
        text += [f"## Attention, forward and backward, T = {row['T']}, {shape}", ""]
        text += table(
            ("backend", "full ms", f"window {row['window']} ms", "window / full"),
            [
                [r["backend"], r["error"], "", ""]
                if "error" in r
                else [r["backend"], f"{r['full ms']:.2f}", f"{r['window ms']:.2f}", f"{r['ratio']:.0%}"]
                for r in by_kind["attention"]
            ],
        )
    for row in by_kind["profile"]:
        text += profile_section(row)
    return "\n".join(text) + "\n"


def train_cells(row: Row) -> list[str]:
    precision = "fp8" if row["fp8"] else row["dtype"]
    cells = [row["recipe"], str(row["depth"]), precision, row["attention"]]
    if "error" in row:
        return [*cells, "", row["error"], "", "", ""]
    return [
        *cells,
        str(row["batch"]),
        f"{row['tokens/s']:,.0f}",
        f"{row['mfu']:.1%}",
        f"{row['memory']:,.0f}",
        f"{row['first']:.0f}",
    ]


def profile_section(row: Row) -> list[str]:
    text = [f"## Profile of a step: {row['recipe']}, depth {row['depth']}, {row['dtype']}", ""]
    if "error" in row:
        return [*text, row["error"], ""]
    text += [
        f"A step takes {row['step ms']:,.1f} ms: {row['micro-batches']} micro-batches of {row['batch']} rows, "
        f"{row['micro-batch ms']:,.1f} ms each, and {row['rest ms']:,.1f} ms for the rest, mainly the optimizer. "
        f"In the profiled step kernels are busy for {row['busy ms']:,.1f} of {row['profiled ms']:,.1f} ms.",
        "",
    ]
    groups = sorted(row["groups"].items(), key=lambda item: -item[1])
    text += table(("kernels", "ms", "share"), [[n, f"{ms:.1f}", f"{ms / row['busy ms']:.1%}"] for n, ms in groups])
    kernels = [
        [f"`{name[:90]}`".replace("|", "/"), str(count), f"{ms:.1f}", f"{ms / row['busy ms']:.1%}"]
        for name, count, ms in row["kernels"]
    ]
    return text + table(("kernel", "calls", "ms", "share"), kernels)


def table(head: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    lines = [list(head), ["---"] * len(head), *rows]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]


def machine_line(machine: Row) -> str:
    text = f"{machine['name']}, torch {machine['torch']}"
    if machine["device"] == "cuda":
        text += f", CUDA {machine['cuda']}, {machine['memory']:.0f} GiB"
    return f"{text}; peak {machine['peak'] / 1e12:.3g} TFLOP/s ({machine['how']})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="directory of the report")
    parser.add_argument("--depths", type=int, nargs="+", default=[12, 20])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS)[1:], default=list(KINDS)[1:])
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on a CPU too")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print_result(options.job)
        return 0
    here = run_job({"kind": "machine", "batch": 1})
    if "error" in here:
        print(here["trace"], file=sys.stderr)
        return 1
    if here["device"] != "cuda" and not options.smoke:
        print("there is no CUDA GPU: run it on a machine with one (--smoke tests the script without)", file=sys.stderr)
        return 2
    print(machine_line(here), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "report.json"
    rows: list[Row] = json.loads(file.read_text())["rows"] if file.exists() else []
    for job in jobs(options):
        if any(row["job"] == job for row in rows):
            continue
        row = {**run_job(job), "job": job}
        rows.append(row)
        print(one_line(row), flush=True)
        file.write_text(json.dumps({"machine": here, "rows": rows}, indent=1))
        (options.out / "report.md").write_text(report(here, rows))
    print(f"the report is in {options.out / 'report.md'}")
    return 0


def one_line(row: Row) -> str:
    names = ("kind", "recipe", "depth", "fp8", "attention", "backend", "batch", "error")
    numbers = ("tokens/s", "mfu", "memory", "full ms", "window ms", "ratio", "step ms")
    return ", ".join([f"{n} {row[n]}" for n in names if n in row] + [f"{n} {row[n]:.4g}" for n in numbers if n in row])


if __name__ == "__main__":
    sys.exit(main())
