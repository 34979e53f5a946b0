"""Examples per second of the evaluator ``core`` on a depth-4 model, against a plain implementation in the same run.

The plain one works like common implementations: one example at a time, its choices in one padded forward pass, logits
at every position, weights cast to the compute dtype in every pass. Both get the same examples, tokenizer and weights
(random: speed does not depend on them); their choices should agree, which the last column counts.

    python benchmarks/eval_speed.py --bundle DIR [--examples 40] [--seq 512] [--vocab 32768] [--clock cpu] ...
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from nanochat_core import EvaluatorContext, Model, ModelContext, Tokenizer, TokenizerContext, World
from nanochat_core.evaluation.evaluate import inference
from nanochat_core.evaluation.scoring import score_spans
from nanochat_core.hardware.machine import peak_memory_mib, pick_device
from nanochat_core.plugins.discovery import load_plugins
from nanochat_dclm_core.bundle import Task, open_bundle
from nanochat_dclm_core.config import CoreConfig
from nanochat_dclm_core.evaluator import Core
from nanochat_dclm_core.prompts import chosen_examples, prompts, shots, spans


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def plugin(kind: Any, name: str) -> Any:
    entry = load_plugins()[kind].get(name)
    assert entry is not None
    return entry


def train_tokenizer(bundle: Any, vocab_size: int) -> Tokenizer:
    """Train a BPE on the texts of the tasks, so that prompts have about as many tokens as in a real run.

    Small tasks give fewer tokens than ``vocab_size``; the rest of the model's vocabulary is unused.
    """
    texts = [str(v) for t in bundle.tasks for e in bundle.examples(t)[0] for v in e.values()]
    entry = plugin("tokenizer", "bpe")
    return entry.load()(entry.config(vocab_size=min(vocab_size, 16384)), TokenizerContext(documents=lambda: texts))


def build(vocab_size: int, T: int, device: torch.device, dtype: torch.dtype, depth: int) -> Model:
    entry = plugin("model", "gpt")
    torch.manual_seed(0)
    model = entry.load()(entry.config(depth=depth), ModelContext(vocab_size, T, device, dtype))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model.to(device).eval()


def plain(
    model: Model, tokenizer: Tokenizer, task: Task, examples: list[dict[str, Any]], limit: int, work: list[int]
) -> list[int]:
    """Chosen index of each example; for language modeling 1 if greedy decoding is right, else 0."""
    choices = []
    device = next(model.parameters()).device
    for index, example in enumerate(examples):
        texts = prompts(task, example, shots(examples, index, task.shots))
        chosen = spans(task.type, texts, tokenizer)
        rows = [span.ids[-limit:] for span in chosen]
        starts = [max(1, span.start - (len(span.ids) - len(row))) for span, row in zip(chosen, rows, strict=True)]
        longest = max(map(len, rows))
        ids_BT = torch.zeros(len(rows), longest, dtype=torch.int64)
        for row_T, row in zip(ids_BT, rows, strict=True):
            row_T[: len(row)] = torch.from_numpy(row)
        work[0] += ids_BT.numel()
        ids_BT = ids_BT.to(device)
        logits_BTV = model.logits(model.hidden(ids_BT).flatten(0, 1)).view(*ids_BT.shape, -1)
        targets_BT = ids_BT.roll(-1, dims=1)
        losses_BT = torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none"
        ).view_as(targets_BT)
        best_BT = logits_BTV.argmax(-1)
        if task.type == "language_modeling":
            span = slice(starts[0] - 1, len(rows[0]) - 1)
            choices.append(int(torch.equal(best_BT[0, span], targets_BT[0, span])))
        else:
            means = [
                float(losses_T[start - 1 : len(row) - 1].mean())
                for losses_T, start, row in zip(losses_BT, starts, rows, strict=True)
            ]
            choices.append(means.index(min(means)))
    return choices


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=["copa", "winograd", "arc_easy", "jeopardy"])
    parser.add_argument(
        "--examples", type=int, default=40, help="examples of tasks with shots; tasks without have 2.5 times as many"
    )
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: CPU time of all threads, for busy machines"
    )
    parser.add_argument(
        "--only", choices=["ours", "plain"], help="run only one of them, to compare the peak memory of two processes"
    )
    options = parser.parse_args()
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    device, dtype = pick_device(0), getattr(torch, options.dtype)
    bundle = open_bundle(options.bundle, Path())
    tokenizer = train_tokenizer(bundle, options.vocab)
    model = build(options.vocab, options.seq, device, dtype, options.depth)
    print(
        f"depth {options.depth}, T {options.seq}, {options.dtype}, vocabulary {options.vocab}, {device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"medians of {options.rounds} rounds, {options.clock} time"
    )
    print(
        f"{'task':<12}{'shots':>6}{'plain ex/s':>12}{'ours ex/s':>12}{'scoring only':>14}{'ratio':>8}"
        f"{'tokens':>10}{'plain':>10}{'logits':>9}  same choices"
    )
    for label in options.tasks:
        (task,) = [t for t in bundle.tasks if t.label == label]
        count = options.examples if task.shots else options.examples * 5 // 2
        examples = chosen_examples(bundle.examples(task)[0], count)
        context = EvaluatorContext(tokenizer, World(0, 1, device), options.seq, 32, lambda split, tokens: iter(()))
        times: dict[str, list[float]] = {"plain": [], "ours": [], "again": []}
        plain_tokens, same, work = [0], 0, dict[str, int]()
        for round_ in range(options.rounds):
            theirs: list[int] = []
            if options.only != "ours":
                plain_tokens[0] = 0
                with torch.no_grad():
                    start = clock()
                    theirs = plain(model, tokenizer, task, examples, 10 * options.seq, plain_tokens)
                    synchronize(device)
                    times["plain"].append(clock() - start)
            if options.only == "plain":
                continue
            with inference(model, dtype):
                evaluator = Core(CoreConfig(bundle=options.bundle, max_per_task=count, tasks=(label,)), context)
                evaluator._bundle = bundle
                start = clock()
                rows = evaluator.evaluate(model, round_).examples  # tokenizes, like the plain one
                synchronize(device)
                times["ours"].append(clock() - start)
                start = clock()
                questions = [question.spans for question in evaluator._prepare(task)]
                work = {}
                score_spans(model, questions, greedy=task.type == "language_modeling", work=work)
                synchronize(device)
                times["again"].append(clock() - start)
            ours = [int(row["value"]) if row["chosen"] < 0 else row["chosen"] for row in rows]
            same = sum(a == b for a, b in zip(ours, theirs, strict=False))
        speed = {
            name: len(examples) / statistics.median(all_) if all_ else float("nan") for name, all_ in times.items()
        }
        print(
            f"{label:<12}{task.shots:>6}{speed['plain']:>12.2f}{speed['ours']:>12.2f}{speed['again']:>14.2f}"
            f"{speed['ours'] / speed['plain']:>8.1f}{work.get('tokens', 0):>10,}{plain_tokens[0]:>10,}"
            f"{work.get('head', 0):>9,}  {same} of {len(examples)}",
            flush=True,
        )
    print(f"peak memory {peak_memory_mib(device):,.0f} MiB" + (f" (only {options.only})" if options.only else ""))


if __name__ == "__main__":
    main()
