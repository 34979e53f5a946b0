"""Tokens per second of complete training steps on a CPU: ours against plain PyTorch and the Trainer of transformers.

    python benchmarks/train_speed.py                       # depth 4, T = 512, 8,192 tokens per step, both vocabularies
    python benchmarks/train_speed.py --vocab 32768 --rounds 20 --variants plain:4 ours:bfloat16 peak:bfloat16

Variants:
    plain:M               the same model in plain PyTorch (plain_gpt.py), eager, float32, all parameters trained by
                          torch.optim.AdamW by default, M sequences per micro-batch; the fastest is the baseline
    plain:M:fused         with AdamW's fused kernel;   plain:M:muon    with Muon on the matrices
    transformers:DTYPE:M  NanoChatForCausalLM of the same shape under transformers.Trainer with its default optimizer,
                          without logging or saves; bfloat16 is bf16=True; needs pip install -e '.[benchmarks]'
    ours:DTYPE            experiments/classic.toml at this shape, with the steps of a run; also with :compiled, and with
                          :speedrun for experiments/speedrun.toml
    peak:DTYPE            the fastest square matrix product, in FLOPs per second

Every variant runs in its own process. In each round every variant does a few steps while the others wait, so that other
load of the machine affects all alike. Medians over rounds are printed; "cpu" is CPU time divided by the number of
threads, which other load affects less. "of peak" is 6 FLOPs per parameter and token, and those of attention, against
the measured bfloat16 peak.
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
from pathlib import Path
from typing import Any

# Set before torch is imported, in all variants: waiting threads sleep after a short spin.
THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}
# Only in our variants, like `nanochat run`: large blocks of memory are in huge pages, and freed ones are kept, so that
# they need not be faulted in again at every step.
MEMORY = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "2147483647",
    "MALLOC_TOP_PAD_": "67108864",
}

Step = Callable[[int], float]


def ours(options: argparse.Namespace, dtype: str, extras: list[str]) -> tuple[Step, float]:
    """Build our model. Returns a training step, and FLOPs per token."""
    import torch
    from training import EXPERIMENTS, Training

    speedrun = "speedrun" in extras
    overrides = [
        f"model.depth={options.depth}",
        f"tokenizer.vocab_size={options.vocab}",
        f"train.max_seq_len={options.seq_len}",
        f"train.total_batch_size={options.tokens}",
        f"train.device_batch_size={options.micro_batch}",
        f"train.dtype={dtype}",
        f"train.compile={str('compiled' in extras).lower()}",
        "train.num_iterations=1000000",
        *(["model.fp8=false"] if speedrun else []),
    ]
    file = EXPERIMENTS / ("speedrun.toml" if speedrun else "classic.toml")
    training = Training(file, overrides, torch.device("cpu"))
    ids, targets = training.batch()
    return lambda number: training.step(ids, targets), training.plan.flops_per_token


def plain(options: argparse.Namespace, micro_batch: int, optimizer: str) -> tuple[Step, float]:
    from plain_gpt import PlainTrainer
    from training import made_up_tokens

    width = 64 * options.depth
    heads = -(-width // 128)
    trainer = PlainTrainer(options.depth, width, heads, options.vocab, options.seq_len, micro_batch, optimizer)
    ids, targets = made_up_tokens(options.tokens // options.seq_len, options.seq_len, options.vocab)
    parameters = sum(p.numel() for n, p in trainer.model.named_parameters() if n != "embedding.weight")
    return lambda number: trainer.step(ids, targets), classic_flops(options, parameters)


def classic_flops(options: argparse.Namespace, parameters: int) -> float:
    """FLOPs per token of the classic model with ``parameters`` in matrix products."""
    return 6 * parameters + options.depth * 12 * 64 * options.depth * options.seq_len


def peak(dtype: str) -> Step:
    """A step that returns FLOPs per second of the fastest square matrix product."""
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


class Parent:
    """The measuring process, as a variant communicates with it. ``pause`` must be called after each step."""

    def __init__(self, steps: int) -> None:
        self.steps, self.count, self.started = steps, 0, time.perf_counter()
        self.out, sys.stdout = sys.stdout, sys.stderr  # libraries print to stdout
        self.result, self.clocks = 0.0, (0.0, 0.0)

    def first(self, flops: float) -> None:
        self._send({"first": time.perf_counter() - self.started, "flops": flops})
        self._wait()

    def pause(self) -> None:
        """Count a step. After the last step of a round, report and wait for the next round."""
        self.count += 1
        if self.count == self.steps:
            wall, cpu = time.perf_counter() - self.clocks[0], time.process_time() - self.clocks[1]
            self._send({"wall": wall / self.steps, "cpu": cpu / self.steps, "result": self.result})
            self._wait()

    def _send(self, message: dict[str, float]) -> None:
        print(json.dumps(message), file=self.out, flush=True)

    def _wait(self) -> None:
        if not sys.stdin.readline():
            raise SystemExit(0)
        self.count, self.result = 0, 0.0
        self.clocks = time.perf_counter(), time.process_time()


def serve(name: str, options: argparse.Namespace) -> None:
    """Run one variant: for each line from stdin, do some steps and write their times to stdout."""
    import torch

    torch.manual_seed(0)
    parent = Parent(options.steps)
    kind, *rest = name.split(":")
    if kind == "transformers":
        serve_trainer(options, rest[0], int(rest[1]), parent)
        return
    if kind == "peak":
        step, flops = peak(rest[0]), 0.0
    elif kind == "plain":
        step, flops = plain(options, int(rest[0]), rest[1] if len(rest) > 1 else "adamw")
    else:
        step, flops = ours(options, rest[0], rest[1:])
    step(0)
    parent.first(flops)
    number = 0
    while True:
        number += 1
        parent.result = max(parent.result, step(number))
        parent.pause()


def serve_trainer(options: argparse.Namespace, dtype: str, micro_batch: int, parent: Parent) -> None:
    import tempfile

    import transformers
    from training import made_up_tokens

    from nanochat_gpt.config import GPTConfig
    from nanochat_gpt.transformers_names import to_nanochat_config

    arguments = to_nanochat_config(GPTConfig(depth=options.depth), options.vocab, options.seq_len)
    config = transformers.NanoChatConfig(**arguments, bos_token_id=None, eos_token_id=None, use_cache=False)
    model = transformers.NanoChatForCausalLM(config)
    rows = options.tokens // options.seq_len
    ids, _ = made_up_tokens(rows, options.seq_len, options.vocab)

    class Rows:
        def __len__(self) -> int:
            return rows * 10**5

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"input_ids": ids[index % rows], "labels": ids[index % rows]}

    parameters = sum(p.numel() for n, p in model.named_parameters() if "embed_tokens" not in n)

    class Pause(transformers.TrainerCallback):
        """Callback that counts a step from its start to the start of the next, with all work of the Trainer."""

        started = False

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                parent.first(classic_flops(options, parameters))
            elif state.global_step > 1:
                parent.pause()

    with tempfile.TemporaryDirectory() as directory:
        settings = transformers.TrainingArguments(
            output_dir=directory,
            max_steps=10**5,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=rows // micro_batch,
            bf16=dtype == "bfloat16",
            use_cpu=True,
            lr_scheduler_type="constant",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        transformers.Trainer(model, settings, train_dataset=Rows(), callbacks=[Pause()]).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--vocab", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--tokens", type=int, default=8192, help="tokens per step")
    parser.add_argument("--micro-batch", type=int, default=16, help="sequences per micro-batch of our variants")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=2, help="steps per variant and round")
    parser.add_argument("--variants", nargs="*")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    vocabularies = options.vocab
    for options.vocab in vocabularies:
        if options.serve:
            serve(options.serve, options)
            return
        names = options.variants or default_variants(options)
        report(options, names, *measure(options, names))


def default_variants(options: argparse.Namespace) -> list[str]:
    import importlib.util

    rows = options.tokens // options.seq_len
    names = [f"plain:{m}" for m in (2, 4, 8) if m <= rows]
    names += [f"plain:{min(4, rows)}:{how}" for how in ("fused", "muon")]
    if importlib.util.find_spec("accelerate") is not None:
        names += [f"transformers:{dtype}:{min(4, rows)}" for dtype in ("float32", "bfloat16")]
    names += ["ours:float32", "ours:bfloat16", "ours:bfloat16:compiled"]
    if (Path(__file__).parents[1] / "experiments" / "speedrun.toml").exists():
        names.append("ours:bfloat16:speedrun")
    return [*names, "peak:bfloat16", "peak:float32"]


Results = dict[str, list[dict[str, float]]]


def measure(options: argparse.Namespace, names: list[str]) -> tuple[Results, dict[str, float]]:
    """Run all variants in rounds. Returns results of the rounds, and FLOPs per token, by variant."""
    processes, results, flops = {}, Results(), {}
    shared = ("depth", "seq_len", "vocab", "tokens", "micro_batch", "steps")
    own = [f"--{key.replace('_', '-')}={getattr(options, key)}" for key in shared]
    for name in names:
        environment = {**os.environ, **THREADS, **(MEMORY if name.startswith("ours") else {})}
        command = [sys.executable, __file__, *own, "--serve", name]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        line = process.stdout.readline()
        if not line:
            print(f"{name:<28} failed (see above) and is left out", flush=True)
            continue
        first = json.loads(line)
        processes[name], flops[name], results[name] = process, first["flops"], []
        print(f"{name:<28} first step done {first['first']:.1f} s after the import of torch", flush=True)
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
    return results, flops


def report(options: argparse.Namespace, names: list[str], results: Results, flops: dict[str, float]) -> None:
    import torch

    names = [name for name in names if name in results]
    threads = torch.get_num_threads()
    print(f"\n{machine()}, {threads} threads, torch {torch.__version__}")
    print(f"depth {options.depth}, T = {options.seq_len}, vocabulary {options.vocab}, {options.tokens} tokens per step")
    peaks = {n: max(r["result"] for r in results[n]) for n in names if n.startswith("peak")}
    for name, flops_per_second in peaks.items():
        print(f"{name:<28} {flops_per_second / 1e12:.2f} TFLOP/s")
    speed = {n: options.tokens / statistics.median(r["wall"] for r in results[n]) for n in names if n not in peaks}
    cpu = {n: statistics.median(r["cpu"] for r in results[n]) / threads for n in speed}
    plain_ones = [n for n in speed if n.startswith("plain") and n.count(":") == 1]
    baseline = max(plain_ones, key=lambda n: speed[n], default=None)
    print(f"{'variant':<28} {'tokens/s':>9} {'best':>7} {'cpu ms':>7} {'ratio':>6} {'cpu ratio':>9} {'of peak':>8}")
    for name, rate in speed.items():
        best = options.tokens / min(r["wall"] for r in results[name])
        ratio = statistics.median(
            b["wall"] / r["wall"] for b, r in zip(results[baseline or name], results[name], strict=True)
        )
        share = rate * flops[name] / peaks.get("peak:bfloat16", float("nan"))
        cpu_ratio = cpu[baseline or name] / cpu[name]
        print(
            f"{name:<28} {rate:>9,.0f} {best:>7,.0f} {cpu[name] * 1e3:>7.0f} {ratio:>6.2f} {cpu_ratio:>9.2f}"
            f" {share:>8.1%}" + ("   <- baseline" if name == baseline else "")
        )
    print(flush=True)


def machine() -> str:
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    amx = ", AMX" if getattr(torch.cpu, "_is_amx_tile_supported", bool)() else ""
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}{amx})"


if __name__ == "__main__":
    main()
