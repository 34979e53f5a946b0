"""Tokens per second of the generation engine, against a plain loop that makes one sequence at a time.

The plain loop is what ``generate`` was before the engine: one prompt, the model's cache of one sequence, softmax and
draw by torch. Random weights: speed does not depend on them. Variants run in interleaved rounds; ``--clock cpu`` counts
CPU time of all threads, for machines that others use too. The floor is the time in which the weights are read once, at
the bandwidth of a large sum.

    python benchmarks/generation_speed.py [--depth 4] [--vocab 8192] [--rounds 5] [--evaluation] [--clock cpu] ...
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from nanochat_core import Engine, Model, ModelContext, Request
from nanochat_core.evaluation.evaluate import inference
from nanochat_core.plugins.discovery import load_plugins

SAMPLING = {"temperature": 0.8, "top_k": 50}


def build(options: argparse.Namespace, dtype: torch.dtype) -> Model:
    entry = load_plugins()["model"].get("gpt")
    assert entry is not None
    torch.manual_seed(0)
    context = ModelContext(options.vocab, 512, torch.device("cpu"), dtype)
    model: Model = entry.load()(entry.config(depth=options.depth), context)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def plain(model: Model, prompt: list[int], new_tokens: int) -> list[int]:
    """One sequence, one token at a time."""
    generator = torch.Generator().manual_seed(42)
    cache, unread, tokens = model.new_cache(1, len(prompt) + new_tokens), prompt, []
    for _ in range(new_tokens):
        logits_V = model.logits(model.hidden(torch.tensor([unread]), cache)[:, -1])[0].float()
        best_K, ids_K = logits_V.topk(SAMPLING["top_k"])
        p_K = ((best_K - best_K[0]) / SAMPLING["temperature"]).softmax(-1)
        token = int(ids_K[torch.multinomial(p_K, 1, generator=generator)])
        tokens.append(token)
        unread = [token]
    return tokens


def prompts(count: int, shortest: int, longest: int, vocab: int) -> list[list[int]]:
    pick = random.Random(count)
    return [[pick.randrange(vocab) for _ in range(pick.randint(shortest, longest))] for _ in range(count)]


def bandwidth() -> float:
    """Bytes per second of reading 256 MiB."""
    data = torch.ones(2**26)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - start)
    return data.nbytes / min(times)


def measure(variants: dict[str, Callable[[], int]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median tokens per second of each variant, which returns its number of tokens."""
    speeds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            start = clock()
            tokens = run()
            speeds[name].append(tokens / (clock() - start))
    return {name: statistics.median(values) for name, values in speeds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--evaluation", action="store_true", help="also 200 prompts of 20 to 400 tokens")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    options = parser.parse_args()
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    models = {name: build(options, getattr(torch, name)) for name in ("float32", "bfloat16")}
    variants: dict[str, Callable[[], int]] = {}

    def add(name: str, dtype: str, run: Callable[[Model], int]) -> None:
        def timed() -> int:
            with inference(models[dtype], getattr(torch, dtype)):
                return run(models[dtype])

        variants[f"{name}, {dtype}"] = timed

    def continued(texts: list[list[int]], new: int) -> Callable[[Model], int]:
        requests = [Request(prompt=text, max_tokens=new, seed=n, **SAMPLING) for n, text in enumerate(texts)]
        return lambda model: sum(len(c[0].tokens) for c in Engine(model).complete(requests))

    one = prompts(1, options.prompt, options.prompt, options.vocab)
    for dtype in models:
        add("plain loop", dtype, lambda model: len(plain(model, one[0], options.new)))
        for batch in options.batches:
            texts = one if batch == 1 else prompts(batch, options.prompt // 2, options.prompt, options.vocab)
            add(f"engine, {batch} at once", dtype, continued(texts, options.new))
    if options.evaluation:
        texts = prompts(200, 20, 400, options.vocab)
        for dtype in models:
            add("200 prompts, plain loop", dtype, lambda model: sum(len(plain(model, text, 128)) for text in texts))
            add("200 prompts, engine", dtype, continued(texts, 128))
    measure(variants, 1, clock)
    found = measure(variants, options.rounds, clock)
    print(
        f"depth {options.depth}, vocabulary {options.vocab}, prompt {options.prompt}, {options.new} new tokens, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; medians of {options.rounds} rounds, "
        f"{options.clock} time"
    )
    print(f"{'':<36}{'tokens/s':>10}{'of plain float32':>18}")
    for name, speed in found.items():
        base = found["200 prompts, plain loop, float32" if name.startswith("200") else "plain loop, float32"]
        print(f"{name:<36}{speed:>10,.0f}{speed / base:>18.2f}")
    speed = bandwidth()
    for dtype, model in models.items():
        read = sum(p.numel() for n, p in model.named_parameters() if n != "embedding.weight")
        bytes_ = read * getattr(torch, dtype).itemsize
        print(
            f"floor of a step, {dtype}: {bytes_ / 2**20:.1f} MiB of weights at {speed / 2**30:.1f} GiB/s: "
            f"{bytes_ / speed * 1e3:.2f} ms, {speed / bytes_:,.0f} tokens/s one at a time"
        )


if __name__ == "__main__":
    main()
