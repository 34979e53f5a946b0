"""A small evaluation bundle with the layout and special cases of the real one, and a plain implementation of CORE."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from nanochat_core import Model, Tokenizer

WORDS = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "ibis", "jay", "kiwi", "lark", "mole", "newt", "owl"]
WORDS.append("pig")

TASKS: list[dict[str, Any]] = [
    {"label": "arc_easy", "dataset_uri": "a/arc.jsonl", "num_fewshot": [3], "icl_task_type": "multiple_choice",
     "continuation_delimiter": "\nAnswer: "},
    {"label": "copa", "dataset_uri": "a/copa.jsonl", "num_fewshot": [0], "icl_task_type": "multiple_choice"},
    {"label": "winograd", "dataset_uri": "winograd.jsonl", "num_fewshot": [1], "icl_task_type": "schema"},
    {"label": "jeopardy", "dataset_uri": "b/c/jeopardy.jsonl", "num_fewshot": [2], "icl_task_type": "language_modeling",
     "continuation_delimiter": "\nAnswer: ", "has_categories": True},
]  # fmt: skip
BASELINES = {"arc_easy": 25, "copa": 50, "winograd": 50, "jeopardy": 0, "something_else": 7}


def examples() -> dict[str, list[dict[str, Any]]]:
    """Examples by task, with choices that are prefixes of others, equal choices or contexts, and trailing spaces."""
    rng = random.Random(0)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))

    arc = [
        {"query": words(2, 9), "choices": [words(1, 3) for _ in range(rng.choice([3, 4, 4, 5]))], "gold": i % 3}
        for i in range(12)
    ]
    arc += [
        {"query": "Which element?", "choices": ["C", "Co", "Cp", "Cu"], "gold": 3},
        {"query": "one is\n", "choices": ["ant", "ant bee", "ant bee cat"], "gold": 0},
        {"query": "twins", "choices": ["owl", "fox", "owl"], "gold": 1},
        {"query": "all the same", "choices": ["jay", "jay"], "gold": 1},
    ]
    copa = [{"gold": i % 2, "query": words(1, 5), "choices": [words(1, 4), words(1, 4)]} for i in range(9)]
    winograd = [
        {"context_options": [f"{a} {words(1, 2)}", f"{b} {words(1, 2)}"], "continuation": words(1, 4), "gold": i % 2}
        for i, (a, b) in enumerate(zip(WORDS[:8], WORDS[8:], strict=True))
    ]
    winograd.append({"context_options": ["pig", "pig"], "continuation": "sat.", "gold": 0})
    jeopardy = [
        {"context": f"  {words(2, 6)} ", "continuation": words(1, 2) + " " * (i == 3), "category": "x"}
        for i in range(10)
    ]
    jeopardy += [dict(jeopardy[0]), {"context": "nothing follows", "continuation": ""}]
    return {"arc_easy": arc, "copa": copa, "winograd": winograd, "jeopardy": jeopardy}


def write_bundle(root: Path, baselines: dict[str, float] | None = None) -> Path:
    """Write the bundle to a directory, which is returned. ``baselines`` replace some baselines (percent)."""
    from yaml import safe_dump

    root.mkdir(parents=True, exist_ok=True)
    (root / "core.yaml").write_text(safe_dump({"icl_tasks": TASKS}))
    rows = "".join(f"{label},x,y,0,1,{value},,\n" for label, value in (BASELINES | (baselines or {})).items())
    header = "Eval Task,Task Category,Task Type,#shots,#datapoints,Random baseline,Centered Metric?,Description\n"
    (root / "eval_meta_data.csv").write_text(header + rows)
    for task in TASKS:
        file = root / "eval_data" / task["dataset_uri"]
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(example, ensure_ascii=False) for example in examples()[task["label"]]]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def plain_reading(
    model: Model, tokenizer: Tokenizer, task: dict[str, Any], data: list[dict[str, Any]], limit: int, max_len: int
) -> list[tuple[int, bool, list[float]]]:
    """Score examples by a plain implementation of the recipe, with one forward pass per text.

    The start of an empty span or continuation moves back so that one token is left.

    Returns:
        Chosen index (-1 for language modeling), whether it is right, and mean losses of the choices, per example.
    """
    order = list(data)
    random.Random(1337).shuffle(order)
    order = order[:limit]
    delimiter, kind = task.get("continuation_delimiter", " "), task["icl_task_type"]
    found = []
    for i, example in enumerate(order):
        ids = [k for k in range(len(order)) if k != i]
        shots = [order[k] for k in random.Random(1234 + i).sample(ids, task["num_fewshot"][0])]
        texts, blocks = [], []
        if kind == "multiple_choice":
            blocks = [s["query"] + delimiter + s["choices"][s["gold"]] for s in shots]
            texts = ["\n\n".join([*blocks, example["query"] + delimiter + c]) for c in example["choices"]]
        elif kind == "schema":
            blocks = [s["context_options"][s["gold"]] + delimiter + s["continuation"] for s in shots]
            texts = [
                "\n\n".join([*blocks, c + delimiter + example["continuation"]]) for c in example["context_options"]
            ]
        else:
            blocks = [s["context"].strip() + delimiter + s["continuation"] for s in shots]
            whole = "\n\n".join([*blocks, example["context"].strip() + delimiter + example["continuation"]])
            without = "\n\n".join([*blocks, example["context"].strip() + delimiter]).strip()
            texts = [without, whole]
        rows = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
        shortest = min(map(len, rows))
        if kind == "language_modeling":
            start = 0
            while start < shortest and rows[0][start] == rows[1][start]:
                start += 1
            rows, starts = rows[1:], [min(start, len(rows[1]) - 1)]
        elif kind == "multiple_choice":
            start = 0
            while start < shortest and len({row[start] for row in rows}) == 1:
                start += 1
            starts = [min(start, shortest - 1)] * len(rows)
        else:
            same = 0
            while same < shortest and len({row[-1 - same] for row in rows}) == 1:
                same += 1
            starts = [len(row) - max(1, min(same, shortest - 1)) for row in rows]
        losses, right = [], True
        for row, start in zip(rows, starts, strict=True):
            cut = max(0, len(row) - max_len)
            row, start = row[cut:], max(1, start - cut)
            with torch.no_grad():
                log_p_TV = model.logits(model.hidden(torch.tensor([row]))[0]).double().log_softmax(-1)
            each = [-float(log_p_TV[t - 1, row[t]]) for t in range(start, len(row))]
            losses.append(sum(each) / len(each))
            right = all(int(log_p_TV[t - 1].argmax()) == row[t] for t in range(start, len(row)))
        if kind == "language_modeling":
            found.append((-1, right, losses))
        else:
            # equal texts get equal losses, independent of rounding
            losses = [losses[rows.index(row)] for row in rows]
            chosen = losses.index(min(losses))
            found.append((chosen, chosen == example["gold"], losses))
    return found
