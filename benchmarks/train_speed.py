"""Tokens a second of whole training steps on the CPU: ours against plain PyTorch and the Trainer of transformers.

    python benchmarks/train_speed.py                       # depth 4, T = 512, 8,192 tokens a step, both vocabularies
    python benchmarks/train_speed.py --vocab 32768 --rounds 20 --variants plain:4 ours:bfloat16 peak:bfloat16

Variants:
    plain:M               the same model written plainly (plain_gpt.py), eager, float32, every parameter by
                          torch.optim.AdamW as it comes, M sequences a micro-batch: the best of these is the baseline
    plain:M:fused         with AdamW's fused kernel;   plain:M:muon    with Muon on the matrices
    transformers:DTYPE:M  NanoChatForCausalLM of the same shape under transformers.Trainer with its default optimizer,
                          nothing logged or saved; bfloat16 is bf16=True; needs pip install -e '.[benchmarks]'
    ours:DTYPE            experiments/classic.toml at this shape, as a run trains it; with :compiled, and with :speedrun
                          for experiments/speedrun.toml
    peak:DTYPE            the fastest square product of matrices, in FLOPs a second

Every variant is a process of its own. Rounds interleave: in each, every variant does a few steps while the others
wait, so that whatever else the machine does hits all alike. Medians over rounds; "cpu" is CPU time divided by the
threads, which other work disturbs less. "of peak" is 6 FLOPs a parameter and token, and those of attention, against the
measured bfloat16 peak.
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

# Before torch is imported. Waiting threads sleep after a short spin: in all variants.
THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}
# In ours alone, as `nanochat run` does: large blocks of memory in huge pages, and kept when they are freed instead of
# being given back and faulted in again at every step.
MEMORY = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "2147483647",
    "MALLOC_TOP_PAD_": "67108864",
}

Step = Callable[[int], float]


def ours(options: argparse.Namespace, dtype: str, extras: list[str]) -> tuple[Step, float]:
    """A step, and FLOPs a token."""
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
    """FLOPs a token with so many parameters in products."""
    return 6 * parameters + options.depth * 12 * 64 * options.depth * options.seq_len


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


class Parent:
    """The measuring process, seen from a variant: ``pause`` is called between steps."""

    def __init__(self, steps: int) -> None:
        self.steps, self.count, self.started = steps, 0, time.perf_counter()
        self.out, sys.stdout = sys.stdout, sys.stderr  # libraries print
        self.result, self.clocks = 0.0, (0.0, 0.0)

    def first(self, flops: float) -> None:
        self._say({"first": time.perf_counter() - self.started, "flops": flops})
        self._wait()

    def pause(self) -> None:
        """A step is done; after the round's last one, report and wait for the next round."""
        self.count += 1
        if self.count == self.steps:
            wall, cpu = time.perf_counter() - self.clocks[0], time.process_time() - self.clocks[1]
            self._say({"wall": wall / self.steps, "cpu": cpu / self.steps, "result": self.result})
            self._wait()

    def _say(self, message: dict[str, float]) -> None:
        print(json.dumps(message), file=self.out, flush=True)

    def _wait(self) -> None:
        if not sys.stdin.readline():
            raise SystemExit(0)
        self.count, self.result = 0, 0.0
        self.clocks = time.perf_counter(), time.process_time()


def serve(name: str, options: argparse.Namespace) -> None:
    """Be one variant: for each line read, do some steps and write what they took."""
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
        """From the start of a step to the start of another: all that the Trainer does lies between."""

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
    parser.add_argument("--tokens", type=int, default=8192, help="tokens a step")
    parser.add_argument("--micro-batch", type=int, default=16, help="sequences a micro-batch of ours")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=2, help="steps a variant and round")
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
    """Results of the rounds, and FLOPs a token, by variant."""
    processes, results, flops = {}, Results(), {}
    own = [f"--{key.replace('_', '-')}={getattr(options, key)}" for key in
           ("depth", "seq_len", "vocab", "tokens", "micro_batch", "steps")]  # fmt: skip
    for name in names:
        environment = {**os.environ, **THREADS, **(MEMORY if name.startswith("ours") else {})}
        command = [sys.executable, __file__, *own, "--serve", name]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        line = process.stdout.readline()
        if not line:
            print(f"{name:<28} failed, see above: left out", flush=True)
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
    print(f"depth {options.depth}, T = {options.seq_len}, vocabulary {options.vocab}, {options.tokens} tokens a step")
    peaks = {n: max(r["result"] for r in results[n]) for n in names if n.startswith("peak")}
    for name, found in peaks.items():
        print(f"{name:<28} {found / 1e12:.2f} TFLOP/s")
    speed = {n: options.tokens / statistics.median(r["wall"] for r in results[n]) for n in names if n not in peaks}
    cpu = {n: statistics.median(r["cpu"] for r in results[n]) / threads for n in speed}
    plain_ones = [n for n in speed if n.startswith("plain") and n.count(":") == 1]
    baseline = max(plain_ones, key=lambda n: speed[n], default=None)
    print(f"{'variant':<28} {'tokens/s':>9} {'best':>7} {'cpu ms':>7} {'ratio':>6} {'cpu ratio':>9} {'of peak':>8}")
    for name, tokens_a_second in speed.items():
        best = options.tokens / min(r["wall"] for r in results[name])
        ratio = statistics.median(
            b["wall"] / r["wall"] for b, r in zip(results[baseline or name], results[name], strict=True)
        )
        share = tokens_a_second * flops[name] / peaks.get("peak:bfloat16", float("nan"))
        cpu_ratio = cpu[baseline or name] / cpu[name]
        print(
            f"{name:<28} {tokens_a_second:>9,.0f} {best:>7,.0f} {cpu[name] * 1e3:>7.0f} {ratio:>6.2f} {cpu_ratio:>9.2f}"
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
