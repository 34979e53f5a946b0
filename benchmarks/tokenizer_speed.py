"""Speed of tokenizers on a corpus: encoding in MB/s, training in seconds, and peak memory of training.

    python benchmarks/tokenizer_speed.py --data DIR            a directory of parquet shards
    python benchmarks/tokenizer_speed.py --data DIR --train    training only

Encoding: documents in memory, encoders in alternation with 1 and 2 threads; medians over turns, and of the ratios to
plain calls of tiktoken. "free work" is a hash function that scales with threads: its gain with two threads is the gain
that any encoder could have at that moment, on a shared machine. Training: the tokenizer ``bpe`` from the data source,
against rustbpe with a plain loop over the shards, each in its own process, in alternation.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import rustbpe
import tiktoken

from nanochat_bpe.config import PATTERN, BPEConfig
from nanochat_bpe.tokenizer import BPETokenizer, train
from nanochat_core import SPECIAL_TOKENS, DataContext
from nanochat_parquet.config import ParquetConfig
from nanochat_parquet.source import build as parquet

TURNS = 3
SIZES = (8192, 32768)


def open_documents(data: Path):  # type: ignore[no-untyped-def]
    return parquet(ParquetConfig(str(data)), DataContext(cache_dir=data)).documents("train")


def timed(work: Callable[[str], object], texts: list[str], threads: int) -> float:
    """MB per second."""
    start = time.perf_counter()
    if threads == 1:
        for text in texts:
            work(text)
    else:
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(lambda part: [work(text) for text in part], [texts[i::threads] for i in range(threads)]):
                pass
    return sum(len(text.encode()) for text in texts) / 1e6 / (time.perf_counter() - start)


def encoding(data: Path, megabytes: int) -> None:
    documents = open_documents(data)
    tokenizer = train(documents, BPEConfig(max_chars=20_000_000))
    tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.bos_id)]
    texts: list[str] = []
    size = 0
    for text in documents:
        texts.append(text)
        size += len(text)
        if size > megabytes * 1e6:
            break
    plain = tiktoken.Encoding(
        "plain",
        pat_str=PATTERN,
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={},
    )
    free = hashlib.sha256
    ways: dict[str, Callable[[str], object]] = {
        "plain tiktoken": plain.encode_ordinary,
        "bpe": lambda text: tokenizer.encode_documents([text]),
        "free work": lambda text: free(text.encode() * 64).digest(),
    }
    if importlib.util.find_spec("gigatoken") is not None:
        fast = BPETokenizer(PATTERN, tokens, "gigatoken")
        ways["bpe, gigatoken"] = lambda text: fast.encode_documents([text])
    turns = []  # each has different texts, because gigatoken caches words
    for turn in range(TURNS):
        part = texts[turn * len(texts) // TURNS : (turn + 1) * len(texts) // TURNS]
        turns.append({(name, n): timed(work, part, n) for name, work in ways.items() for n in (1, 2)})
    print(f"{size / 1e6:.0f} MB of text, {TURNS} turns")
    print(f"{'encoding':<20} {'1 thread':>10} {'2 threads':>10} {'/ plain':>8} {'2 / 1':>6}")
    for name in ways:
        one, two = (statistics.median(turn[name, n] for turn in turns) for n in (1, 2))
        ratio = statistics.median(turn[name, 1] / turn["plain tiktoken", 1] for turn in turns)
        gain = statistics.median(turn[name, 2] / turn[name, 1] for turn in turns)
        unit = "" if name != "free work" else "  (possible gain of two threads at this moment)"
        print(f"{name:<20} {one:>10.1f} {two:>10.1f} {ratio:>7.2f}x {gain:>5.2f}x{unit}")


def plain_training(data: Path, vocab_size: int) -> None:
    """Train with rustbpe in a loop over all shards but the last, on documents cut to the length that ``bpe`` uses."""

    def texts():  # type: ignore[no-untyped-def]
        for path in sorted(data.glob("*.parquet"))[:-1]:
            file = pq.ParquetFile(path)
            for group in range(file.num_row_groups):
                for text in file.read_row_group(group)["text"].to_pylist():
                    yield text[:10_000]

    rustbpe.Tokenizer().train_from_iterator(texts(), vocab_size - len(SPECIAL_TOKENS), pattern=PATTERN)


def one_training(how: str, data: Path, vocab_size: int) -> None:
    """Train in this process, and print seconds and peak MiB."""
    documents = open_documents(data)
    import torch  # noqa: F401  # both peaks include the same libraries

    start = time.perf_counter()
    if how == "ours":
        train((text for i in range(0, len(documents), 256) for text in documents[i : i + 256]), BPEConfig(vocab_size))
    else:
        plain_training(data, vocab_size)
    print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def training(data: Path) -> None:
    print(f"\n{'training':<20} {'ours s':>9} {'plain s':>9} {'ratio':>7} {'ours MiB':>9} {'plain MiB':>10}")
    for vocab_size in SIZES:
        measured: dict[str, list[tuple[float, float]]] = {"ours": [], "plain": []}
        for _ in range(TURNS):
            for how, results in measured.items():
                command = [sys.executable, __file__, "--data", str(data), "--one", how, str(vocab_size)]
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
                seconds, peak = map(float, done.stdout.split())
                results.append((seconds, peak))
        ours, plain = measured["ours"], measured["plain"]
        ratio = statistics.median(a[0] / b[0] for a, b in zip(ours, plain, strict=True))
        seconds = [statistics.median(r[0] for r in results) for results in (ours, plain)]
        peaks = [statistics.median(r[1] for r in results) for results in (ours, plain)]
        print(
            f"{f'vocabulary {vocab_size:,}':<20} {seconds[0]:>9.1f} {seconds[1]:>9.1f} {ratio:>6.2f}x "
            f"{peaks[0]:>9,.0f} {peaks[1]:>10,.0f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory of parquet shards")
    parser.add_argument("--megabytes", type=int, default=30, help="amount of text to encode")
    parser.add_argument("--train", action="store_true", help="training only")
    parser.add_argument("--one", nargs=2, metavar=("ours|plain", "VOCAB"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one_training(options.one[0], options.data, int(options.one[1]))
        return
    if not options.train:
        encoding(options.data, options.megabytes)
    training(options.data)


if __name__ == "__main__":
    main()
