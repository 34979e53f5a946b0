"""Small plugins for tests of the core, which must not depend on the plugins that nanochat ships."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import attrs
import numpy as np

from nanochat_core import (
    CheckpointError,
    ConfigError,
    DataError,
    DataSource,
    Logger,
    LoggerContext,
    Split,
    TableTokenizer,
    TokenizerContext,
    Tokens,
    load_table_tokenizer,
    metrics_and_texts,
    option,
    special_tokens_from,
    well_formed,
)
from nanochat_core.plugins.choice import Choice, EntryKeys
from nanochat_core.plugins.registry import Entry


class FakeTokenizer(TableTokenizer):
    """Token i below 256 is the byte i of the text's UTF-8; the special tokens follow."""

    format = "fake-1"

    def __init__(self) -> None:
        super().__init__([bytes([i]) for i in range(256)], special_tokens_from(256))

    def encode_array(self, text: str) -> Tokens:
        return np.frombuffer(well_formed(text).encode(), dtype=np.uint8).astype(np.int32)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.format.encode()).hexdigest()

    def files(self) -> Mapping[str, bytes]:
        return {}


@attrs.frozen
class FakeConfig:
    """No options."""


def build_fake(config: FakeConfig, context: TokenizerContext) -> FakeTokenizer:
    """A factory as plugins have it."""
    if context.saved is not None:
        return load_table_tokenizer(FakeTokenizer, context.saved, lambda _: FakeTokenizer())
    return FakeTokenizer()


# -- a tokenizer that is trained


@attrs.frozen
class TrainedConfig:
    """Options of ``TrainedFake``."""

    vocab_size: int = option(300, "number of tokens, special ones included")
    documents: int = option(1000, "documents that the training reads")
    path: Path | None = option(None, "a file with the tokens, one a line, instead of a training")
    wait_for: Path | None = option(None, "the training ends once this file exists")


class TrainedFake(FakeTokenizer):
    """The bytes, and the documents' most frequent pairs of letters."""

    format = "trained-fake-1"

    def __init__(self, pairs: Sequence[str]) -> None:
        self.pairs = list(pairs)
        tokens = [*(bytes([i]) for i in range(256)), *(pair.encode() for pair in self.pairs)]
        TableTokenizer.__init__(self, tokens, special_tokens_from(len(tokens)))
        self.ids = {pair: 256 + i for i, pair in enumerate(self.pairs)}

    def encode_array(self, text: str) -> Tokens:
        text, ids, at = well_formed(text), [], 0
        while at < len(text):
            token = self.ids.get(text[at : at + 2])
            ids += text[at].encode() if token is None else [token]
            at += 1 if token is None else 2
        return np.array(ids, dtype=np.int32)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([self.format, self.pairs]).encode()).hexdigest()

    def files(self) -> Mapping[str, bytes]:
        return {"pairs.txt": "\n".join(self.pairs).encode()}


SPECIAL = len(special_tokens_from(0))


def build_trained(config: TrainedConfig, context: TokenizerContext) -> TrainedFake:
    """Read the saved pairs or those of ``path``, or count the pairs of the documents."""
    if context.saved is not None:
        directory = context.saved
        return load_table_tokenizer(TrainedFake, directory, lambda _: TrainedFake(_pairs(directory / "pairs.txt")))
    if config.path is not None:
        return TrainedFake(_pairs(config.path))
    counts: Counter[str] = Counter()
    for _, text in zip(range(config.documents), context.documents(), strict=False):
        counts.update(text[i : i + 2] for i in range(len(text) - 1) if text[i : i + 2].isascii())
    pairs = sorted((p for p in counts if p.isprintable()), key=lambda p: (-counts[p], p))
    wanted = config.vocab_size - 256 - SPECIAL
    if len(pairs) < wanted:
        raise DataError(f"vocab_size = {config.vocab_size}: the documents have only {len(pairs)} pairs of letters")
    end = time.monotonic() + 300
    while config.wait_for is not None and not config.wait_for.exists():
        if time.monotonic() > end:
            raise ConfigError(f"{config.wait_for} did not appear")
        time.sleep(0.01)
    return TrainedFake(pairs[:wanted])


def _pairs(file: Path) -> list[str]:
    try:
        pairs = file.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error}") from error
    if any(len(pair) != 2 for pair in pairs):
        raise CheckpointError(f"{file} is damaged: every line must be a pair of letters")
    return pairs


class FakeSource(DataSource):
    """``count`` sample documents.

    Attributes:
        reads: how often they were asked for.
    """

    def __init__(self, count: int = 300) -> None:
        self.count = count
        self.reads = 0

    def documents(self, split: Split) -> Sequence[str]:
        self.reads += 1
        text = f"{split}: the quick brown fox jumps over a lazy dog while seven wizards box "
        return [text[i % 7 :] + text[i % 31 : i % 67] * 3 for i in range(self.count)]

    def fingerprint(self, split: Split) -> str:
        return f"{split} {self.count}"


def trained_choice(**options: Any) -> Choice:
    """``TrainedFake`` as an experiment chooses it."""
    entry = Entry("tokenizer", "fake", TrainedConfig, "helpers.fakes:build_trained", "pairs of letters",
                  distribution="fake", version="1.0")  # fmt: skip
    return Choice(EntryKeys("fake"), entry, TrainedConfig(**options))


# -- a logger


class FakeLogger(Logger):
    """Appends each metric to ``fake.jsonl`` in the run's directory; at resume it drops the steps that come again."""

    rewinds: ClassVar[bool] = True

    def __init__(self, config: FakeConfig, context: LoggerContext) -> None:
        file = context.directory / "fake.jsonl"
        before = file.read_text().splitlines() if file.exists() else []
        kept = [line for line in before if json.loads(line)[0] < context.start_step]
        file.write_text("".join(f"{line}\n" for line in kept))
        self.file = file.open("a")

    def log(self, record: Mapping[str, float | str]) -> None:
        metrics, _ = metrics_and_texts(record)
        self.file.writelines(json.dumps([record["step"], name, value]) + "\n" for name, value in metrics.items())
        self.file.flush()

    def finish(self, status: Literal["finished", "failed", "preempted"]) -> None:
        self.file.close()


def read_fake(run: Path) -> dict[str, dict[int, float]]:
    """What a ``FakeLogger`` wrote: value by metric and step."""
    found: dict[str, dict[int, float]] = {}
    for step, name, value in map(json.loads, (run / "fake.jsonl").read_text().splitlines()):
        assert step not in found.setdefault(name, {}), "told twice"
        found[name][step] = value
    return found
