"""How many tokens a second the training loader delivers, against the plainest loop that makes steps of text.

    python benchmarks/loader_speed.py                  the documentation inside Python
    python benchmarks/loader_speed.py --data DIR       a directory of parquet shards

One process with one background thread; nothing else is done with the tokens. "a core" counts the processor time of all
threads. The plain loop has all documents in a list, calls tiktoken's ``encode_ordinary`` on one after the other and
packs a Python list into tensors: one stream, no lanes, no cursors, no thread. Prints medians of several turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path

import tiktoken
import torch

from nanochat_bpe.config import BPEConfig
from nanochat_bpe.tokenizer import BPETokenizer, train
from nanochat_core import DataContext, DataSource, Tokenizer
from nanochat_core.loader import TrainLoader
from nanochat_core.packing import lanes
from nanochat_parquet.config import ParquetConfig
from nanochat_parquet.source import build as parquet
from nanochat_python_docs.config import PythonDocsConfig
from nanochat_python_docs.source import build as python_docs

VOCAB_SIZE = 8192
TURNS = 5
SHAPES = ((16, 512), (32, 2048))  # rows a step, tokens a row
STEPS_AHEAD = 3  # what the first step of a loader has to wait for, at most


def plain(documents: Sequence[str], encoding: tiktoken.Encoding, bos: int, rows: int, T: int) -> Iterator[object]:
    """Steps of ids and targets, int64 [rows, T]."""
    texts = cycle(documents)
    buffer: list[int] = []
    while True:
        while len(buffer) < rows * T + 1:
            buffer.append(bos)
            buffer.extend(encoding.encode_ordinary(next(texts)))
        step = torch.tensor(buffer[: rows * T + 1])
        del buffer[: rows * T]
        yield step[:-1].view(rows, T), step[1:].view(rows, T)


def ours(documents: Sequence[str], tokenizer: Tokenizer, rows: int, T: int) -> Iterator[object]:
    with TrainLoader(
        documents,
        tokenizer,
        rows_per_step=rows,
        lanes=lanes(rows, len(documents)),
        max_seq_len=T,
        device_batch_size=rows,
    ) as loader:
        yield from loader


def rates(steps: Iterator[object], tokens_per_step: int, tokens: int) -> tuple[float, float]:
    """Tokens a second, and tokens a second of processor time; the start is included."""
    count = max(tokens // tokens_per_step, 8 * STEPS_AHEAD)
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(count):
        next(steps)
    made = count * tokens_per_step
    return made / (time.perf_counter() - wall), made / (time.process_time() - processor)


def median_rates(start: Callable[[], Iterator[object]], tokens_per_step: int, tokens: int) -> list[float]:
    turns = [rates(start(), tokens_per_step, tokens) for _ in range(TURNS)]
    return [statistics.median(column) for column in zip(*turns, strict=True)]


def compare(documents: Sequence[str], tokenizer: BPETokenizer, tokens: int) -> None:
    in_memory = list(documents)
    encoding = tiktoken.Encoding(
        "plain",
        pat_str=BPEConfig().pattern,
        mergeable_ranks={tokenizer.decode_bytes([i]): i for i in range(tokenizer.bos_id)},
        special_tokens=dict(tokenizer.special_tokens),
    )
    print(f"{'tokens a second':<18} {'loader':>12} {'a core':>12} {'plain loop':>12} {'loader / plain':>15}")
    for rows, T in SHAPES:
        loader, core = median_rates(partial(ours, documents, tokenizer, rows, T), rows * T, tokens)
        loop, _ = median_rates(partial(plain, in_memory, encoding, tokenizer.bos_id, rows, T), rows * T, tokens)
        print(f"{f'{rows} x {T}':<18} {loader:>12,.0f} {core:>12,.0f} {loop:>12,.0f} {loader / loop:>14.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory of parquet shards; default: Python's own documentation")
    parser.add_argument("--tokens", type=int, default=4_000_000, help="tokens of each turn")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        context = DataContext(cache_dir=Path(directory))
        source: DataSource
        if options.data:
            source = parquet(ParquetConfig(options.data), context)
        else:
            source = python_docs(PythonDocsConfig(), context)
        documents = source.documents("train")
        tokenizer = train(documents, BPEConfig(vocab_size=VOCAB_SIZE, max_chars=20_000_000))
        print(f"{len(documents):,} documents, vocabulary {VOCAB_SIZE}, {options.tokens:,} tokens a turn, {TURNS} turns")
        compare(documents, tokenizer, options.tokens)


if __name__ == "__main__":
    main()
