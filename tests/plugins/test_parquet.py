from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.hub_server import serve
from hypothesis import given
from hypothesis import strategies as st

from nanochat_core import DataContext, DataError
from nanochat_parquet import files
from nanochat_parquet.config import ParquetConfig
from nanochat_parquet.documents import ParquetDocuments, read_shard
from nanochat_parquet.files import File, find, hash_samples
from nanochat_parquet.source import ParquetSource, build

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


def source(path: Path | str | tuple[str, ...], column: str = "text", **options: Any) -> ParquetSource:
    where = str(path) if isinstance(path, Path) else path
    return build(ParquetConfig(path=where, text_column=column, **options), DataContext(cache_dir=Path("unused")))


def file(path: Path) -> File:
    return find(str(path), "data.path")[0]


def test_splits(shards: Path) -> None:
    assert list(source(shards).documents("train")) == [*texts_of(0), *texts_of(1), *texts_of(2)]
    assert list(source(shards).documents("val")) == texts_of(3)


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


class Counting(ParquetDocuments):
    """Counts the row groups that are read from files."""

    reads = 0

    def _read_file(self, group: int) -> pa.ChunkedArray:
        self.reads += 1
        return super()._read_file(group)


def counting(shards: Path, cache_bytes: int) -> Counting:
    return Counting([read_shard(f, "text") for f in find(str(shards), "data.path")], "text", cache_bytes=cache_bytes)


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
    with pytest.raises(DataError, match=r"^text_column: .* has no column 'text'; set it to one of 'content'"):
        source(shards).documents("val")
    with pytest.raises(DataError, match=r"holds int64, not strings"):
        source(shards, "id").documents("val")


def test_directory_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^path: .*nowhere does not exist"):
        source(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"^path: .* holds no \*\.parquet"):
        source(tmp_path)
    write(tmp_path / "a.parquet", ["x"])
    with pytest.raises(DataError, match=r"^path: .* holds 1 .* two or more .* or set data\.val_path"):
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
    before = hash_samples(file(path))
    assert hash_samples(file(path)) == before
    texts[31] = texts[31][:-1]  # outside the samples: the footer tells
    write(path, list(texts))
    assert hash_samples(file(path)) != before


def test_footer(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ["".join(random.Random(i).choices("abcdefgh", k=5000)) for i in range(10)])
    footer = read_shard(file(tmp_path / "a.parquet"), "text").footer
    assert footer.rows == (4, 4, 2)
    assert footer.text_bytes == pytest.approx(50_000, rel=0.05)


# --------------------------------------------------------------------------------------------- where shards may be


def test_places(shards: Path) -> None:
    everything = [*texts_of(0), *texts_of(1), *texts_of(2)]
    assert list(source(f"{shards}/shard_*.parquet").documents("train")) == everything
    assert list(source(f"file://{shards}").documents("train")) == everything
    listed = tuple(str(shards / f"shard_0000{i}.parquet") for i in (2, 0, 3))
    assert list(source(listed).documents("train")) == [*texts_of(2), *texts_of(0)]
    with pytest.raises(DataError, match="matches no files"):
        source(f"{shards}/*.csv")


def test_validation_files(shards: Path) -> None:
    only = source(str(shards / "shard_0000[012].parquet"), val_path=str(shards / "shard_00003.parquet"))
    assert list(only.documents("train")) == [*texts_of(0), *texts_of(1), *texts_of(2)]
    assert list(only.documents("val")) == texts_of(3)
    assert only.fingerprint("val") == source(shards).fingerprint("val")
    with pytest.raises(DataError, match=r"shard_00003\.parquet is among the training files too"):
        source(shards, val_path=str(shards / "shard_00003.parquet"))
    with pytest.raises(ValueError, match="not both"):
        source(shards, val_path="x", val_fraction=0.1)


@given(st.sampled_from([0.5, 0.3, 0.1, 0.04]), st.slices(45))
def test_validation_fraction(shards: Path, fraction: float, part: slice) -> None:
    everything = [*texts_of(0), *texts_of(1), *texts_of(2), *texts_of(3)]
    held_out = source(shards, val_fraction=fraction)
    k = round(1 / fraction)
    expected = [text for i, text in enumerate(everything) if i % k != k - 1], everything[k - 1 :: k]
    train, val = held_out.documents("train"), held_out.documents("val")
    assert (list(train), list(val)) == expected
    assert (len(train), len(val)) == tuple(map(len, expected))
    assert train[part] == expected[0][part]
    assert val[part] == expected[1][part]
    assert held_out.fingerprint("train") != held_out.fingerprint("val")


def test_urls(shards: Path) -> None:
    with serve(shards) as server:
        server.faults, server.spare_ends = ["503", "drop"], False
        urls = tuple(f"{server.url}/plain/shard_0000{i}.parquet" for i in range(4))
        remote = source(urls)
        assert list(remote.documents("train")) == [*texts_of(0), *texts_of(1), *texts_of(2)]
        assert list(remote.documents("val")) == texts_of(3)
        assert not server.faults
        assert all(part for _, part in server.ranges)  # never whole files
        assert remote.fingerprint("train") == source(urls).fingerprint("train")
        with pytest.raises(DataError, match=r"nothing\.parquet can't be read: its server answers 404; check the URL"):
            source((f"{server.url}/plain/nothing.parquet",))


@pytest.fixture
def plain_server(shards: Path) -> Iterator[str]:
    """A server that knows no ranges."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(shards))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_server_without_ranges(plain_server: str) -> None:
    (found,) = find(f"{plain_server}/shard_00001.parquet", "data.path")
    documents = ParquetDocuments([read_shard(found, "text")], "text")  # the footer of so small a file is all of it
    with pytest.raises(
        DataError, match=r"shard_00001\.parquet does not support range requests; download the file instead"
    ):
        documents[0]


def test_what_does_not_pass_is_told_after_some_attempts(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "ATTEMPTS", 2)
    with serve(shards) as server:
        (found,) = find(f"{server.url}/plain/shard_00001.parquet", "data.path")
        path = shards / "shard_00001.parquet"
        path.write_bytes(path.read_bytes()[:-10])  # it changes underneath
        with pytest.raises(
            DataError, match=r"shard_00001\.parquet can't be read, after 2 attempts .* bytes instead of"
        ):
            read_shard(found, "text")
        server.down = True
        with pytest.raises(DataError, match="can't be read, after 2 attempts"):
            source((f"{server.url}/plain/shard_00001.parquet",))


def test_file_systems_of_fsspec(shards: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(shards), "/bucket/texts", recursive=True)
    for place in ("memory://bucket/texts", "memory://bucket/texts/*.parquet"):
        assert list(source(place).documents("train")) == [*texts_of(0), *texts_of(1), *texts_of(2)]
    assert (
        list(source("memory://bucket/texts/shard_00003.parquet", val_fraction=0.5).documents("val"))
        == texts_of(3)[1::2]
    )
    for place, problem in (("memory://bucket/none", "holds no parquet files"), ("nosuch://a/b", "can't be listed")):
        with pytest.raises(DataError, match=problem):
            source(place)


# -------------------------------------------------------------------------------------------------- what is damaged


def test_damaged_row_group_is_skipped(shards: Path) -> None:
    path = shards / "shard_00001.parquet"
    whole = path.read_bytes()
    path.write_bytes(b"PAR1" + b"\xff" * 400 + whole[404:])
    with pytest.raises(
        DataError, match=r"its 4 documents .*; download or copy this file again, or set data\.on_error to skip"
    ):
        list(source(shards).documents("train"))
    skipping = source(shards, on_error="skip")
    train = skipping.documents("train")
    expected = [*texts_of(0), *texts_of(1), *texts_of(2)]
    got = list(train)
    assert len(got) == len(expected)
    assert [text for text in got if text] == [e for e, g in zip(expected, got, strict=True) if g]
    empty = got.count("")
    assert empty >= 4
    assert empty % 4 == 0
    list(train)
    assert len(skipping.problems()) == empty // 4  # each told once
    assert skipping.problems()[0].startswith(f"skipped: row group 0 of {path} can't be read: its 4 documents")
    path.write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"can't be read as parquet"):
        source(shards).documents("train")
    without = source(shards, on_error="skip")
    assert list(without.documents("train")) == [*texts_of(0), *texts_of(2)]
    assert len(without.problems()) == 1


def test_file_that_vanishes_is_never_skipped(shards: Path) -> None:
    documents = source(shards, on_error="skip").documents("train")
    assert len(documents) == 42
    (shards / "shard_00001.parquet").unlink()
    with pytest.raises(DataError, match="restore this file"):
        list(documents)


def test_text_that_is_not_utf8(shards: Path) -> None:
    broken = pa.Array.from_buffers(pa.string(), 3, pa.array([b"fine", b"\xff\xfe", b"fine too"]).buffers())
    pq.write_table(pa.table({"text": broken}), shards / "shard_00003.parquet")
    with pytest.raises(DataError, match=r"row 1 of row group 0 of .*shard_00003\.parquet is not UTF-8"):
        list(source(shards).documents("val"))
    skipping = source(shards, on_error="skip")
    assert list(skipping.documents("val")) == ["fine", "", "fine too"]
    assert len(skipping.problems()) == 1


@pytest.mark.skipif(not CORPUS.is_dir(), reason="no corpus here")
def test_corpus() -> None:
    corpus = source(CORPUS)
    train, val = corpus.documents("train"), corpus.documents("val")
    assert (len(train), len(val)) == (15682, 647)
    assert sum(len(text.encode()) for text in val) == 3002317
    assert train[5000:9000:1000] == [train[5000], train[6000], train[7000], train[8000]]


# ------------------------------------------------------------------------------------------------ columns of strings


@pytest.mark.parametrize("kind", [pa.string_view(), pa.dictionary(pa.int32(), pa.large_string())])
def test_more_kinds_of_strings(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"text": pa.array(["a", None, "b", "ä"], pa.string()).cast(kind)}), tmp_path / "a.parquet")
    assert list(source(tmp_path / "a.parquet", val_fraction=0.5).documents("val")) == ["", "ä"]


@pytest.mark.parametrize(
    ("columns", "names", "problem"),
    [
        ([["a"], ["b"]], ["text", "text"], r"has 2 columns named 'text'; choose a file"),
        (
            [[b"a"], ["b"]],
            ["text", "words"],
            r"holds binary, not strings; set it to one of 'words', or write it as str",
        ),
        ([[None], ["b"]], ["text", "words"], r"holds null, not strings; set it to one of 'words'"),
        ([[["a"]], [1]], ["text", "id"], r"holds list.*, not strings; choose a file"),
    ],
)
def test_columns_that_are_no_strings(tmp_path: Path, columns: list[Any], names: list[str], problem: str) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array(c) for c in columns], names), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=problem):
        source(tmp_path / "a.parquet", val_fraction=0.5).documents("train")


def test_a_footer_whose_names_are_not_utf8(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"] * 40}), tmp_path / "a.parquet", row_group_size=10)
    whole = bytearray((tmp_path / "a.parquet").read_bytes())
    at = whole.rindex(b"text", 0, whole.rindex(b"ARROW:schema"))  # the path in the metadata of the last row group
    whole[at + 2] = 0xEF
    (tmp_path / "a.parquet").write_bytes(whole)
    with pytest.raises(DataError, match=r"a\.parquet can't be read as parquet \(.*footer is damaged"):
        source(tmp_path / "a.parquet", val_fraction=0.5).documents("train")
