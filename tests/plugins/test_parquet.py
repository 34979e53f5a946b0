from __future__ import annotations

import os
import random
import shutil
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat_core import DataContext, DataError
from nanochat_parquet.config import ParquetConfig
from nanochat_parquet.documents import Documents, Shard
from nanochat_parquet.source import ParquetSource, build, hash_samples, read_footer

CORPUS = Path(__file__).parents[2].parent / "shared" / "data" / "corpus"
SIZES = (10, 25, 7, 3)  # documents of each shard, the last for validation


def write(path: Path, texts: list[str | None], rows: int = 4, column: str = "text") -> None:
    table = pa.table({"id": range(len(texts)), column: pa.array(texts, pa.string())})
    pq.write_table(table, path, row_group_size=rows)


def texts_of(shard: int) -> list[str]:
    return [f"shard {shard} row {i} " + "é" * (i % 5) for i in range(SIZES[shard])]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for shard in range(len(SIZES)):
        write(tmp_path / f"shard_{shard:05d}.parquet", list(texts_of(shard)))
    (tmp_path / "shard_00009.parquet.partial").write_bytes(b"half a download")
    return tmp_path


def source(directory: Path, column: str = "text") -> ParquetSource:
    return build(ParquetConfig(path=directory, text_column=column), DataContext(cache_dir=directory))


def test_splits(shards: Path) -> None:
    assert list(source(shards).documents("train")) == [*texts_of(0), *texts_of(1), *texts_of(2)]
    assert list(source(shards).documents("val")) == texts_of(3)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.slices(42), st.integers(-42, 41))
def test_indexes_like_a_list(shards: Path, part: slice, index: int) -> None:
    documents = source(shards).documents("train")
    expected = [*texts_of(0), *texts_of(1), *texts_of(2)]
    assert len(documents) == len(expected) == 42
    assert documents[part] == expected[part]
    assert documents[index] == expected[index]
    assert expected[index] in documents


@pytest.mark.parametrize("index", [42, -43])
def test_index_outside(shards: Path, index: int) -> None:
    with pytest.raises(IndexError):
        source(shards).documents("train")[index]


def test_nulls_are_empty_documents(shards: Path) -> None:
    write(shards / "shard_00001.parquet", ["one", None, "", "two"])
    assert source(shards).documents("train")[10:14] == ["one", "", "", "two"]


class Counting(Documents):
    """Counts the row groups that are read from files."""

    reads = 0

    def _read_file(self, group: int) -> pa.ChunkedArray:
        self.reads += 1
        return super()._read_file(group)


def counting(shards: Path, cache_bytes: int) -> Counting:
    return Counting([read_footer(path, "text") for path in sorted(shards.glob("*.parquet"))], "text", cache_bytes)


def test_slice_reads_each_row_group_once(shards: Path) -> None:
    documents = counting(shards, cache_bytes=0)
    assert len(documents[::2]) == 23
    assert documents.reads == 3 + 7 + 2 + 1
    documents.reads = 0
    assert len(documents[1:9:3]) == 3
    assert documents.reads == 2


def test_cache_keeps_what_was_used_last_within_its_bounds(shards: Path) -> None:
    group = pq.ParquetFile(shards / "shard_00000.parquet").read_row_group(0, columns=["text"])["text"].nbytes
    documents = counting(shards, cache_bytes=group * 5 // 2)  # two row groups, not three
    for index, reads in ((0, 1), (1, 1), (4, 2), (0, 2), (8, 3), (0, 3), (4, 4)):
        documents[index]
        assert documents.reads == reads, index


def test_threads(shards: Path) -> None:
    documents = counting(shards, cache_bytes=500)
    expected = [text for shard in range(len(SIZES)) for text in texts_of(shard)]
    wrong = []

    def read(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(200):
            i = rng.randrange(len(expected))
            if documents[i] != expected[i] or documents[i::5] != expected[i::5]:
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert documents.reads > 20


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_kinds_of_strings(shards: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"text": pa.array(["a", None, "b"]).cast(kind)}), shards / "shard_00003.parquet")
    assert list(source(shards).documents("val")) == ["a", "", "b"]


def test_another_column(shards: Path) -> None:
    for path in shards.glob("*.parquet"):
        write(path, ["words"], column="content")
    assert source(shards, "content").documents("val")[0] == "words"
    with pytest.raises(DataError, match=r"no column 'text'; set data\.text_column to one of 'id', 'content'"):
        source(shards).documents("val")
    with pytest.raises(DataError, match=r"holds int64, not strings"):
        source(shards, "id").documents("val")


def test_directory_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.path: .*nowhere is no directory"):
        source(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"data\.path: .* holds 0 \*\.parquet"):
        source(tmp_path)
    write(tmp_path / "a.parquet", ["x"])
    with pytest.raises(DataError, match=r"data\.path: .* holds 1 .* two or more"):
        source(tmp_path)


def test_home_directory(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(shards.parent))
    assert source(Path("~") / shards.name).documents("val")[0] == texts_of(3)[0]


def test_damaged_files(shards: Path) -> None:
    whole = (shards / "shard_00001.parquet").read_bytes()
    for content in (b"", b"not parquet", whole[: len(whole) // 2]):
        (shards / "shard_00001.parquet").write_bytes(content)
        with pytest.raises(DataError, match=r"shard_00001\.parquet can't be read as parquet"):
            source(shards).documents("train")
    (shards / "shard_00001.parquet").write_bytes(b"PAR1" + b"\xff" * 400 + whole[404:])
    with pytest.raises(DataError, match=r"row group 0 of .*shard_00001\.parquet can't be read"):
        source(shards).documents("train")[10]


def test_file_that_vanishes(shards: Path) -> None:
    documents = source(shards).documents("train")
    (shards / "shard_00001.parquet").unlink()
    with pytest.raises(DataError, match=r"row group 0 of .*shard_00001\.parquet can't be read"):
        documents[10]


def test_no_rows(shards: Path) -> None:
    write(shards / "shard_00003.parquet", [])
    with pytest.raises(DataError, match=r"the val shards in .* hold no rows"):
        source(shards).documents("val")


def test_fingerprint(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    train, val = source(shards).fingerprint("train"), source(shards).fingerprint("val")
    assert train != val
    copy = tmp_path_factory.mktemp("elsewhere")
    for path in shards.glob("*.parquet"):
        shutil.copy(path, copy)
        os.utime(copy / path.name, (1, 1))
    assert source(copy).fingerprint("train") == train
    assert source(copy, "id").fingerprint("train") != train
    texts = texts_of(1)
    texts[7] = texts[7].replace("row", "raw")  # same size
    write(copy / "shard_00001.parquet", list(texts))
    assert source(copy).fingerprint("train") != train
    assert source(copy).fingerprint("val") == val


def test_samples_of_a_large_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh", k=5_000)) for _ in range(200)]
    write(path, list(texts))
    before = hash_samples(path)
    assert hash_samples(path) == before
    texts[31] = texts[31][:-1]  # outside the samples: the footer tells
    write(path, list(texts))
    assert hash_samples(path) != before


def test_shard_lists_its_row_groups(shards: Path) -> None:
    assert read_footer(shards / "shard_00000.parquet", "text") == Shard(shards / "shard_00000.parquet", (4, 4, 2))


@pytest.mark.skipif(not CORPUS.is_dir(), reason="no corpus here")
def test_corpus() -> None:
    corpus = source(CORPUS)
    train, val = corpus.documents("train"), corpus.documents("val")
    assert (len(train), len(val)) == (15682, 647)
    assert sum(len(text.encode()) for text in val) == 3002317
    assert train[5000:9000:1000] == [train[5000], train[6000], train[7000], train[8000]]
