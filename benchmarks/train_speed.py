"""Tokens a second of whole training steps on the CPU: ours against the same model and optimizer written plainly.

    python benchmarks/train_speed.py                       # depth 4, T = 512, vocabulary 8,192, 8,192 tokens a step
    python benchmarks/train_speed.py --vocab 32768 --rounds 20

Every variant is a process of its own. Rounds interleave: in each, every variant does a few steps while the others
wait, so that whatever else the machine does hits all alike. Medians over rounds; "cpu" is CPU time divided by the
threads, which other work disturbs less. The plain variant runs with several micro-batches, and its best counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

# Before torch is imported. Waiting threads sleep after a short spin: in all variants.
THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}
# In ours alone: large blocks of memory in huge pages, and kept when they are freed instead of being given back and
# faulted in again at every step.
MEMORY = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "2147483647",
    "MALLOC_TOP_PAD_": "67108864",
}

Step = Callable[[int], float]


def ours(options: argparse.Namespace, dtype: str, compile: bool) -> Step:
    import torch

    from nanochat_core import ModelContext, Multipliers, OptimizerContext, World
    from nanochat_gpt.config import GPTConfig
    from nanochat_gpt.model import build as build_model
    from nanochat_muon.config import MuonAdamWConfig
    from nanochat_muon.optimizer import build as build_optimizer

    cpu, dtype = torch.device("cpu"), getattr(torch, dtype)
    model = build_model(GPTConfig(depth=options.depth), ModelContext(options.vocab, options.seq_len, cpu, dtype))
    roles, world = model.parameter_roles(), World(0, 1, cpu)
    parameters = dict(model.named_parameters())
    context = OptimizerContext(parameters, roles, model.hidden_size, world, options.tokens, options.rounds)
    optimizer = build_optimizer(MuonAdamWConfig(), context)
    if compile:
        model.compile_training()
    ids, targets = batch(options)

    def step(number: int) -> float:
        total = 0.0
        micro_batches = list(zip(ids.split(options.micro_batch), targets.split(options.micro_batch), strict=True))
        for index, (x, y) in enumerate(micro_batches):
            if index == len(micro_batches) - 1:
                optimizer.begin_reduce()
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                loss = model(x, y)
            loss.backward()
            total += loss.item()
        norm = float(optimizer.reduce()) / options.tokens
        scale = min(1.0, 1.0 / (norm + 1e-6)) / options.tokens
        optimizer.update(scale, Multipliers(step=number, num_iterations=10**6, lr=1.0))
        return total / options.tokens

    return step


def plain(options: argparse.Namespace, micro_batch: int) -> Step:
    from plain_gpt import PlainTrainer

    width = 64 * options.depth
    trainer = PlainTrainer(options.depth, width, -(-width // 128), options.vocab, options.seq_len, micro_batch)
    ids, targets = batch(options)
    return lambda number: trainer.step(ids, targets)


def peak(dtype: str) -> Step:
    """Fastest square product: FLOPs a second instead of a loss."""
    import torch

    pairs = [torch.randn(2, n, n, dtype=getattr(torch, dtype)) for n in (1024, 2048, 4096)]

    def step(number: int) -> float:
        best = 0.0
        for a, b in pairs:
            start = time.perf_counter()
            a @ b
            best = max(best, 2 * len(a) ** 3 / (time.perf_counter() - start))
        return best

    return step


def batch(options: argparse.Namespace) -> tuple[Any, Any]:
    """Token ids with frequencies like those of words (1 / rank)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    rows, weights = options.tokens // options.seq_len, 1 / torch.arange(1, options.vocab + 1)
    ids = torch.multinomial(weights, rows * (options.seq_len + 1), replacement=True, generator=generator)
    ids = ids.view(rows, -1)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def make(name: str, options: argparse.Namespace) -> Step:
    kind, *rest = name.split(":")
    if kind == "plain":
        return plain(options, int(rest[0]))
    if kind == "peak":
        return peak(rest[0])
    return ours(options, rest[0], "compiled" in rest)


def serve(name: str, options: argparse.Namespace) -> None:
    """Be one variant: for each line read, do some steps and write what they took."""
    import torch

    torch.manual_seed(0)
    start = time.perf_counter()
    step = make(name, options)
    step(0)
    print(json.dumps({"first": time.perf_counter() - start}), flush=True)
    number = 1
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        results = [step(number + i) for i in range(options.steps)]
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        number += options.steps
        times = {"wall": wall / options.steps, "cpu": cpu / options.steps}
        print(json.dumps({**times, "result": max(results)}), flush=True)


def flops_per_token(options: argparse.Namespace) -> float:
    width = 64 * options.depth
    parameters = options.depth * 12 * width**2 + options.vocab * width
    return 6 * parameters + options.depth * 12 * width * options.seq_len


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens a step")
    parser.add_argument("--micro-batch", type=int, default=16, help="sequences a micro-batch of ours")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=2, help="steps a variant and round")
    parser.add_argument(
        "--variants", nargs="*", help="such as plain:4 ours:bfloat16 ours:bfloat16:compiled peak:bfloat16"
    )
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options)
        return
    names = options.variants or [
        *(f"plain:{m}" for m in (2, 4, 8, 16) if m <= options.tokens // options.seq_len),
        "ours:float32",
        "ours:bfloat16",
        "ours:bfloat16:compiled",
        "peak:bfloat16",
        "peak:float32",
    ]
    report(options, names, measure(options, names))


def measure(options: argparse.Namespace, names: list[str]) -> dict[str, list[dict[str, float]]]:
    processes = {}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for name in names:
        environment = {**os.environ, **THREADS, **(MEMORY if name.startswith("ours") else {})}
        command = [sys.executable, __file__, *sys.argv[1:], "--serve", name]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        processes[name] = process
        first = json.loads(process.stdout.readline())["first"]
        print(f"{name:<24} first step done {first:.1f} s after the import of torch", flush=True)
    for round_number in range(options.rounds + 1):
        for name, process in processes.items():
            process.stdin.write("go\n")
            process.stdin.flush()
            result = json.loads(process.stdout.readline())
            if round_number:  # the first round is warm-up
                results[name].append(result)
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return results


def report(options: argparse.Namespace, names: list[str], results: dict[str, list[dict[str, float]]]) -> None:
    import torch

    threads = torch.get_num_threads()
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"\n{platform.machine()}, {capability}, {threads} threads, torch {torch.__version__}")
    print(f"depth {options.depth}, T = {options.seq_len}, vocabulary {options.vocab}, {options.tokens} tokens a step")
    peaks = {n: max(r["result"] for r in results[n]) for n in names if n.startswith("peak")}
    for name, flops in peaks.items():
        print(f"{name:<24} {flops / 1e12:.2f} TFLOP/s")
    speed = {n: options.tokens / statistics.median(r["wall"] for r in results[n]) for n in names if n not in peaks}
    cpu = {n: statistics.median(r["cpu"] for r in results[n]) / threads for n in speed}
    baseline = max((n for n in speed if n.startswith("plain")), key=lambda n: speed[n], default=None)
    print(f"{'variant':<24} {'tokens/s':>9} {'best':>7} {'cpu ms':>7} {'ratio':>6} {'cpu ratio':>9} {'of peak':>8}")
    for name, tokens_a_second in speed.items():
        best = options.tokens / min(r["wall"] for r in results[name])
        ratio = statistics.median(
            b["wall"] / r["wall"] for b, r in zip(results[baseline or name], results[name], strict=True)
        )
        share = tokens_a_second * flops_per_token(options) / peaks.get("peak:bfloat16", float("nan"))
        cpu_ratio = cpu[baseline or name] / cpu[name]
        print(
            f"{name:<24} {tokens_a_second:>9,.0f} {best:>7,.0f} {cpu[name] * 1e3:>7.0f} {ratio:>6.2f} {cpu_ratio:>9.2f}"
            f" {share:>8.1%}" + ("   <- baseline" if name == baseline else "")
        )


if __name__ == "__main__":
    main()
