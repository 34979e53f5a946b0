"""Conversion of a task's examples to texts, and of texts to spans of tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from nanochat_core import Span, Tokenizer, Tokens, choice_spans
from nanochat_dclm_core.bundle import Task, TaskType


def chosen_examples(examples: Sequence[dict[str, Any]], limit: int | Literal["all"]) -> list[dict[str, Any]]:
    """The first ``limit`` examples after the shuffle (seed 1337) that published CORE results use."""
    shuffled = list(examples)
    random.Random(1337).shuffle(shuffled)
    return shuffled if limit == "all" else shuffled[:limit]


def shots(examples: Sequence[dict[str, Any]], index: int, count: int) -> list[dict[str, Any]]:
    """``count`` solved examples for the one at ``index``; fewer when there are fewer others."""
    others = [i for i in range(len(examples)) if i != index]
    return [examples[i] for i in random.Random(1234 + index).sample(others, min(count, len(others)))]


def prompts(task: Task, example: dict[str, Any], before: Sequence[dict[str, Any]]) -> list[str]:
    """Texts of an example, one per choice; for language modeling one without the continuation and one with it."""
    head = "".join(_solved(task, shot) + "\n\n" for shot in before)
    match task.type:
        case "multiple_choice":
            return [f"{head}{example['query']}{task.delimiter}{choice}" for choice in example["choices"]]
        case "schema":
            endings = task.delimiter + example["continuation"]
            return [f"{head}{option}{endings}" for option in example["context_options"]]
        case "language_modeling":
            text = f"{head}{example['context'].strip()}{task.delimiter}"
            return [text.strip(), text + example["continuation"]]


def _solved(task: Task, example: dict[str, Any]) -> str:
    match task.type:
        case "multiple_choice":
            return f"{example['query']}{task.delimiter}{example['choices'][example['gold']]}"
        case "schema":
            return f"{example['context_options'][example['gold']]}{task.delimiter}{example['continuation']}"
        case "language_modeling":
            return f"{example['context'].strip()}{task.delimiter}{example['continuation']}"


def spans(kind: TaskType, texts: Sequence[str], tokenizer: Tokenizer) -> list[Span]:
    """Spans to score: one per choice, or for language modeling the continuation."""
    if kind != "language_modeling":
        return choice_spans(tokenizer, texts, "prefix" if kind == "multiple_choice" else "suffix")
    without, whole = tokenizer.encode_documents(texts)
    # The span starts after the common tokens of both texts: a tokenizer may merge prompt and continuation. With an
    # empty continuation the last token is scored.
    return [Span(whole, max(1, min(_common(without, whole), len(whole) - 1)))]


def _common(a: Tokens, b: Tokens) -> int:
    shortest = min(len(a), len(b))
    different = np.flatnonzero(np.asarray(a)[:shortest] != np.asarray(b)[:shortest])
    return int(different[0]) if len(different) else shortest
