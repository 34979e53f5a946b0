"""Tokens per second of the training loader, against a simple loop that makes steps of text.

    python benchmarks/loader_speed.py                  the documentation inside Python
    python benchmarks/loader_speed.py --data DIR       a directory of parquet shards
    python benchmarks/loader_speed.py --packing        share of tokens that best_fit loses, by window

One process converts shards to tensors, which are not used. The plain loop has all documents in a list already, calls
tiktoken's ``encode_ordinary`` on one after the other and packs a Python list into tensors: one stream, without lanes,
cursors or threads. For best_fit only delivered tokens count, and the first window of each lane is included. The
variants alternate, and medians over turns (of the ratios too) are printed, because the speed of a shared machine
changes from minute to minute. "per core": tokens per second of processor time, of all threads.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import torch

from nanochat_bpe.config import PATTERN, BPEConfig
from nanochat_bpe.tokenizer import BPETokenizer, train
from nanochat_core import DataContext, DataSource
from nanochat_core.data.best_fit import best_fit
from nanochat_core.data.loader import TrainLoader
from nanochat_core.data.packing import Encoder, TokenSource, lanes
from nanochat_core.data.token_cache import open_cache
from nanochat_parquet.config import ParquetConfig
from nanochat_parquet.source import build as parquet
from nanochat_python_docs.config import PythonDocsConfig
from nanochat_python_docs.source import build as python_docs

TURNS = 3
SHAPES = ((16, 512), (32, 2048))  # rows per step, tokens per row
PLAIN = "plain loop"


def plain(documents: Sequence[str], encoding: tiktoken.Encoding, bos: int, rows: int, T: int) -> Iterator[object]:
    """Yield steps of the plain loop: ids and targets, int64 [rows, T]."""
    texts = cycle(documents)
    buffer: list[int] = []
    while True:
        while len(buffer) < rows * T + 1:
            buffer.append(bos)
            buffer.extend(encoding.encode_ordinary(next(texts)))
        step = torch.tensor(buffer[: rows * T + 1])
        del buffer[: rows * T]
        yield step[:-1].view(rows, T), step[1:].view(rows, T)


def ours(source: TokenSource, rows: int, T: int, **options: Any) -> Iterator[object]:
    """Yield steps of the loader."""
    count = lanes(rows, len(source), options.get("packing", "stream"))
    with TrainLoader(
        source, rows_per_step=rows, lanes=count, max_seq_len=T, device_batch_size=rows, **options
    ) as loader:
        yield from loader


def rates(steps: Iterator[object], step_tokens: int, tokens: int) -> tuple[float, float]:
    """Tokens per second, and tokens per second of processor time, including the start."""
    count = max(tokens // step_tokens, 24)
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(count):
        next(steps)
    made = count * step_tokens
    return made / (time.perf_counter() - wall), made / (time.process_time() - processor)


def measure(documents: Sequence[str], tokenizer: BPETokenizer, cache_dir: Path, fingerprint: str, tokens: int) -> None:
    in_memory = list(documents)
    encoding = tiktoken.Encoding(
        "plain",
        pat_str=PATTERN,
        mergeable_ranks={token: i for i, token in enumerate(tokens_of(tokenizer))},
        special_tokens=dict(tokenizer.special_tokens),
    )
    fresh = Encoder(documents, tokenizer)
    cached = open_cache(cache_dir, fresh, fingerprint, tokenizer)
    for start in range(0, len(documents), 256):
        cached.read(range(start, min(start + 256, len(documents))))

    def from_cache() -> TokenSource:
        return open_cache(cache_dir, fresh, fingerprint, tokenizer)

    for shape in SHAPES:
        ways: dict[str, Callable[[], Iterator[object]]] = {
            PLAIN: partial(plain, in_memory, encoding, tokenizer.bos_id, *shape),
            "stream": partial(ours, fresh, *shape),
            "stream, 2 threads": partial(ours, fresh, *shape, threads=2),
            "best_fit": partial(ours, fresh, *shape, packing="best_fit"),
            "best_fit, 2 threads": partial(ours, fresh, *shape, packing="best_fit", threads=2),
            "stream, cache": lambda shape=shape: ours(from_cache(), *shape),
            "best_fit, cache": lambda shape=shape: ours(from_cache(), *shape, packing="best_fit"),
        }
        if importlib.util.find_spec("gigatoken") is not None:
            fast = Encoder(documents, BPETokenizer(PATTERN, tokens_of(tokenizer), "gigatoken"))
            ways["stream, gigatoken"] = partial(ours, fast, *shape)
            ways["best_fit, gigatoken"] = partial(ours, fast, *shape, packing="best_fit")
        step = math.prod(shape)
        turns = [{name: rates(start(), step, tokens) for name, start in ways.items()} for _ in range(TURNS)]
        print(f"\n{' x '.join(map(str, shape)):<22} {'tokens/s':>12} {'per core':>12} {'/ plain':>9}")
        for name in ways:
            wall, core = (statistics.median(turn[name][i] for turn in turns) for i in (0, 1))
            ratio = statistics.median(turn[name][0] / turn[PLAIN][0] for turn in turns)
            print(f"{name:<22} {wall:>12,.0f} {core:>12,.0f} {ratio:>8.2f}x", flush=True)


def tokens_of(tokenizer: BPETokenizer) -> list[bytes]:
    return [tokenizer.decode_bytes([i]) for i in range(tokenizer.bos_id)]


def rolling(documents: Sequence[np.ndarray], capacity: int, size: int) -> float:
    """Share of tokens that best fit loses with one buffer of ``size`` documents, refilled after each document."""
    coming = iter(documents)
    buffer = sorted(len(document) for _, document in zip(range(size), coming, strict=False))
    kept = lost = 0
    while len(buffer) == size:
        room = capacity
        while room > 0:
            best = int(np.searchsorted(buffer, room, side="right")) - 1
            length = buffer.pop(max(best, 0))
            kept, lost = kept + min(length, room), lost + max(length - room, 0)
            room -= min(length, room)
            following = next(coming, None)
            if following is None:
                break
            buffer.insert(int(np.searchsorted(buffer, len(following))), len(following))
    return lost / max(lost + kept, 1)


def packing_loss(documents: Sequence[str], tokenizer: BPETokenizer) -> None:
    tokens = tokenizer.encode_documents(list(documents))
    total = sum(map(len, tokens))
    print(f"\nshare of tokens that best_fit loses, of {total:,} (mean {total / len(tokens):.0f} per document)")
    print(f"{'window':<10}" + "".join(f"{f'T = {T}':>12}" for _, T in SHAPES) + f"{'rolling 2048':>14}")
    for window in (16, 32, 64, 128, 256, 1024):
        losses = []
        for _, T in SHAPES:
            parts = [best_fit(tokens[i : i + window], T + 1)[0] for i in range(0, len(tokens), window)]
            losses.append(1 - sum(rows.tokens.size for rows in parts) / total)
        print(
            f"{window:<10}" + "".join(f"{loss:>12.1%}" for loss in losses) + f"{rolling(tokens, 2049, window):>14.1%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory of parquet shards; default: Python's own documentation")
    parser.add_argument("--tokens", type=int, default=8_000_000, help="tokens per turn")
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--packing", action="store_true", help="only the share of tokens that best_fit loses")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        context = DataContext(cache_dir=Path(directory))
        source: DataSource
        if options.data:
            source = parquet(ParquetConfig(str(options.data)), context)
        else:
            source = python_docs(PythonDocsConfig(), context)
        documents = source.documents("train")
        tokenizer = train(documents, BPEConfig(vocab_size=options.vocab_size, max_chars=20_000_000))
        print(f"{len(documents):,} documents, vocabulary {options.vocab_size:,}, {TURNS} turns")
        if not options.packing:
            measure(documents, tokenizer, Path(directory), source.fingerprint("train"), options.tokens)
        packing_loss(documents, tokenizer)


if __name__ == "__main__":
    main()
