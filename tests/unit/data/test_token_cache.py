"""The token cache: same tokens as without it, whatever happens to its files."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from helpers.fakes import FakeTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_core import Tokens
from nanochat_core.data.loader import TrainLoader
from nanochat_core.data.token_cache import TokenCache, open_cache

TOKENIZER = FakeTokenizer()


class Counting:
    """A token source that notes what it is asked for: document i is 1 + i % 7 tokens, all i."""

    def __init__(self, count: int = 40) -> None:
        self.count = count
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.count

    def read(self, indices: range) -> list[Tokens]:
        self.asked += indices
        return [np.full(1 + i % 7, i, dtype=np.int32) for i in indices]


def open_it(directory: Path, source: Counting | None = None, vocab_size: int = 1000) -> TokenCache:
    return TokenCache(directory, source or Counting(), vocab_size)


def check(cache: TokenCache, indices: range) -> None:
    made = cache.read(indices)
    expected = Counting(len(cache)).read(indices)
    assert [tokens.tolist() for tokens in made] == [tokens.tolist() for tokens in expected]


@pytest.mark.parametrize("vocab_size", [1000, 2**16, 2**17])
def test_what_was_made_is_read_back(tmp_path: Path, vocab_size: int) -> None:
    first = open_it(tmp_path, vocab_size=vocab_size)
    for start in range(3):
        check(first, range(start, 40, 3))
    source = Counting()
    second = open_it(tmp_path, source, vocab_size)
    assert second.num_cached == 40
    check(second, range(40))
    check(second, range(5, 40, 4))
    assert source.asked == []


def test_the_second_epoch_of_a_process_reads_what_the_first_wrote(tmp_path: Path) -> None:
    source = Counting()
    cache = open_it(tmp_path, source)
    for _ in range(3):
        check(cache, range(0, 30, 2))
    check(cache, range(1, 30, 2))
    check(cache, range(30))
    assert sorted(source.asked) == list(range(30))


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 39), st.integers(1, 9), st.integers(1, 12), st.booleans()), max_size=12))
def test_any_reads_in_any_order(tmp_path_factory: pytest.TempPathFactory, reads) -> None:  # type: ignore[no-untyped-def]
    directory = tmp_path_factory.mktemp("cache")
    cache = open_it(directory)
    for start, step, count, again in reads:
        if again:
            cache = open_it(directory)
        check(cache, range(start, min(start + step * count, 40), step))


def test_a_block_cut_short_anywhere_is_ignored(tmp_path: Path) -> None:
    for start in range(0, 40, 10):
        check(open_it(tmp_path), range(start, start + 10))
    cache = open_it(tmp_path)
    check(cache, range(40))
    files = list(tmp_path.glob("*.tokens"))
    assert len(files) == 4
    whole = files[0].read_bytes()
    for length in range(0, len(whole), 7):
        files[0].write_bytes(whole[:length])
        source = Counting()
        cache = open_it(tmp_path, source)
        assert cache.num_cached == 30
        check(cache, range(40))
        for file in set(tmp_path.glob("*.tokens")) - set(files):
            file.unlink()


def test_a_damaged_byte_anywhere_is_noticed(tmp_path: Path) -> None:
    check(open_it(tmp_path), range(10))
    (file,) = tmp_path.glob("*.tokens")
    whole = file.read_bytes()
    for position in range(len(whole)):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 0x41]) + whole[position + 1 :])
        check(open_it(tmp_path), range(10))
        for other in set(tmp_path.glob("*.tokens")) - {file}:
            other.unlink()


def test_several_at_once(tmp_path: Path) -> None:
    caches = [open_it(tmp_path) for _ in range(4)]
    errors: list[BaseException] = []

    def work(cache: TokenCache) -> None:
        try:
            for _ in range(3):
                for start in range(8):
                    check(cache, range(start, 40, 8))
                    check(open_it(tmp_path), range(start, 40, 8))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(cache,)) for cache in caches * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    check(open_it(tmp_path), range(40))


def test_a_directory_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("no directory")
    cache = open_it(tmp_path / "file" / "cache")
    for _ in range(2):
        check(cache, range(40))
    assert capsys.readouterr().err.count("can't be written") == 1


def test_files_that_vanish(tmp_path: Path) -> None:
    cache = open_it(tmp_path)
    check(cache, range(10))
    for file in tmp_path.glob("*.tokens"):
        file.unlink()
    check(cache, range(10))


def test_the_loader_gives_the_same_with_a_cache(tmp_path: Path) -> None:
    class Source:
        def __init__(self) -> None:
            self.reads = 0

        def __len__(self) -> int:
            return 50

        def read(self, indices: range) -> list[Tokens]:
            self.reads += 1
            return TOKENIZER.encode_documents([f"document {i} " * (i % 9) for i in indices])

    def steps(source) -> list[list[int]]:  # type: ignore[no-untyped-def]
        with TrainLoader(source, rows_per_step=4, lanes=2, max_seq_len=16, device_batch_size=4, threads=2,
                         packing="best_fit", window=5) as loader:  # fmt: skip
            return [next(loader).batches[0].ids_BT.tolist() for _ in range(60)]

    plain = steps(Source())
    assert steps(open_cache(tmp_path, Source(), "documents", TOKENIZER)) == plain
    again = Source()
    assert steps(open_cache(tmp_path, again, "documents", TOKENIZER)) == plain
    assert again.reads == 0
    other = Source()
    steps(open_cache(tmp_path, other, "other documents", TOKENIZER))
    assert other.reads > 0
