from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_core import DataContext, DataError
from nanochat_core.data import documents
from nanochat_text import index
from nanochat_text.config import JsonlConfig, TextConfig
from nanochat_text.source import FilesSource, build_jsonl, build_text

TEXTS = [f"document {i} " + "é" * (i % 7) + "\nwith two lines" for i in range(100)]


def lines(texts: list[Any], field: str = "text", end: str = "\n") -> bytes:
    return "".join(json.dumps({"id": 1, field: text}, ensure_ascii=False) + end for text in texts).encode()


def zstd(data: bytes) -> bytes:
    compressed: bytes = pa.compress(data, codec="zstd", asbytes=True)
    return compressed


def jsonl(path: Path | str | tuple[str, ...], **options: Any) -> FilesSource:
    where = str(path) if isinstance(path, Path) else path
    return build_jsonl(JsonlConfig(path=where, **options), context(path))


def text(path: Path | str, **options: Any) -> FilesSource:
    return build_text(TextConfig(path=str(path), **options), context(path))


def context(path: Path | str | tuple[str, ...]) -> DataContext:
    first = Path(path[0] if isinstance(path, tuple) else path)
    return DataContext(cache_dir=(first if first.is_dir() else first.parent) / ".cache")


def everything(source: FilesSource) -> list[str]:
    """All documents in the order of the files, for val_fraction = 0.5."""
    train, val = source.documents("train"), source.documents("val")
    return [*(t for pair in zip(train, val, strict=False) for t in pair), *train[len(val) :]]


# ------------------------------------------------------------------------------------------------------- JSON lines


def test_jsonl_plain_and_compressed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS[:30]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS[30:40])) + gzip.compress(lines(TEXTS[40:60])))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.ndjson.zst").write_bytes(zstd(lines(TEXTS[60:])))
    (tmp_path / "notes.md").write_text("not mine")
    source = jsonl(tmp_path, val_fraction=0.1)
    train, val = source.documents("train"), source.documents("val")
    assert list(val) == TEXTS[9::10]
    assert list(train) == [t for i, t in enumerate(TEXTS) if i % 10 != 9]
    assert train[80:3:-7] == list(train)[80:3:-7]
    assert source.describe()["files"] == 3
    again = jsonl(tmp_path, val_fraction=0.1)
    assert list(again.documents("val")) == TEXTS[9::10]
    assert again.fingerprint("train") == source.fingerprint("train") != source.fingerprint("val")


def test_compressed_files_are_decompressed_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines(TEXTS)))
    assert everything(jsonl(path, val_fraction=0.5)) == TEXTS
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / ".cache" / "text").iterdir() if p.suffix in (".txt", ".spans")}
    assert len(made) == 2
    assert everything(jsonl(path, val_fraction=0.5)) == TEXTS
    assert {p: p.stat().st_mtime_ns for p in made} == made
    path.write_bytes(gzip.compress(lines(TEXTS[:50])))
    assert everything(jsonl(path, val_fraction=0.5)) == TEXTS[:50]


def test_blank_lines_and_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n\r\n" + lines(TEXTS[:5], end="\r\n\n\r\n") + lines(["last"])[:-1])
    assert everything(jsonl(tmp_path / "a.jsonl", val_fraction=0.5)) == [*TEXTS[:5], "last"]


def test_validation_path_and_field(tmp_path: Path) -> None:
    (tmp_path / "train-1.json").write_bytes(lines(["one", None], field="content"))
    (tmp_path / "train-2.json").write_bytes(lines(["two"], field="content"))
    (tmp_path / "val.json").write_bytes(lines(["three"], field="content"))
    source = jsonl(f"{tmp_path}/train-*.json", val_path=str(tmp_path / "val.json"), text_field="content")
    assert (list(source.documents("train")), list(source.documents("val"))) == (["one", "", "two"], ["three"])
    with pytest.raises(DataError, match=r"val\.json is among the training files too"):
        jsonl(f"{tmp_path}/*.json", val_path=str(tmp_path / "val.json"))
    with pytest.raises(DataError, match=r"no field 'text': it has 'id', 'content'; set data\.text_field"):
        everything(jsonl(f"{tmp_path}/*.json", val_fraction=0.5))


BROKEN = {
    "no JSON": b'{"text": "half\n',
    "no object": b'["text"]\n',
    "no string": b'{"text": 3}\n',
    "not UTF-8": b'{"text": "\xff\xfe"}\n',
    "half a surrogate pair": b'{"text": "\\ud800"}\n',
    "deep": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_lines(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(["one"]) + BROKEN[kind] + lines(["two", "three"]))
    with pytest.raises(
        DataError, match=r"the document at byte 25 of .*a\.jsonl can't be read .*set data\.on_error to skip"
    ):
        everything(jsonl(path, val_fraction=0.5))
    source = jsonl(path, val_fraction=0.5, on_error="skip")
    for _ in range(2):
        assert everything(source) == ["one", "", "two", "three"]
    assert len(source.problems()) == 1


def test_too_many_broken_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MOST_SKIPPED", 5)
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS[:10]))
    with pytest.raises(DataError, match=r"more than 5 places can't be read, .*no field 'words'"):
        everything(jsonl(tmp_path, text_field="words", on_error="skip", val_fraction=0.5))


@pytest.mark.parametrize("compress", [gzip.compress, zstd])
def test_damaged_archives(tmp_path: Path, compress: Any) -> None:
    path = tmp_path / ("a.jsonl.gz" if compress is gzip.compress else "a.jsonl.zst")
    texts = [os.urandom(2000).hex() for _ in range(400)]
    whole = compress(lines(texts))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"can't be decompressed after its first [\d,]+ bytes"):
        everything(jsonl(path, val_fraction=0.5))
    assert not list((tmp_path / ".cache" / "text").glob("*.txt"))
    for _ in range(2):  # made, and found again
        source = jsonl(path, val_fraction=0.5, on_error="skip")
        got = everything(source)
        assert 20 < len(got) < 400
        assert got == texts[: len(got)]
        assert len(source.problems()) == 1


def test_a_file_that_shrinks(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TEXTS))
    train = jsonl(path).documents("train")
    path.write_bytes(lines(TEXTS[:50]))
    with pytest.raises(DataError, match="has become shorter"):
        list(train)
    path.unlink()
    with pytest.raises(DataError, match="restore it"):
        list(train)


def test_several_processes_make_one_cache(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines(TEXTS * 2000)))
    script = (
        "import sys; from pathlib import Path; from nanochat_text.index import load_index;"
        "from nanochat_text.files import plain; path, cache = map(Path, sys.argv[1:]);"
        "print(len(load_index(plain(path, cache, False).path, cache)))"
    )
    words = [sys.executable, "-c", script, str(path), str(tmp_path / "cache")]
    processes = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [p.communicate(timeout=300)[0].strip() for p in processes] == ["200000"] * 3
    assert len(list((tmp_path / "cache").glob("*.txt"))) == 1


@settings(max_examples=60)
@given(st.lists(st.text(st.sampled_from("ab\r \n"), max_size=6), max_size=8), st.integers(1, 9))
def test_spans_whatever_the_block_size(tmp_path_factory: pytest.TempPathFactory, parts: list[str], size: int) -> None:
    path = tmp_path_factory.mktemp("spans") / "a"
    data = "".join(parts).encode()
    path.write_bytes(data)
    pieces = data.split(b"\n")
    expected = [p.removesuffix(b"\r") for p in pieces[:-1]] + ([pieces[-1]] if pieces[-1] else [])
    before = index.BLOCK
    try:
        index.BLOCK = size
        spans = np.concatenate([np.empty((0, 2), np.int64), *index.line_spans(path)])
        assert [data[a:b] for a, b in spans] == expected
        separated = np.concatenate([np.empty((0, 2), np.int64), *index.text_spans(path, "a")])
    finally:
        index.BLOCK = before
    groups: list[list[bytes]] = [[]]
    for line in expected:
        if line == b"a":
            groups.append([])
        else:
            groups[-1].append(line)
    got = [data[a:b].replace(b"\r\n", b"\n") for a, b in separated]
    assert got == [b"\n".join(g) for g in groups if g]


# ------------------------------------------------------------------------------------------------------------ text


def test_one_document_a_file(tmp_path: Path) -> None:
    for i, content in enumerate(TEXTS[:6]):
        (tmp_path / f"{i}.txt").write_bytes(content.encode())
    (tmp_path / "6.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfzipped"))
    (tmp_path / "7.txt.zst").write_bytes(zstd(b"zstd"))
    assert everything(text(tmp_path, val_fraction=0.5)) == [*TEXTS[:6], "zipped", "zstd"]
    (tmp_path / "3.txt").write_bytes(b"\xff")
    (tmp_path / "6.txt.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"3\.txt can't be read .*utf-8"):
        everything(text(tmp_path, val_fraction=0.5))
    source = text(tmp_path, val_fraction=0.5, on_error="skip")
    assert everything(source) == [*TEXTS[:3], "", *TEXTS[4:6], "", "zstd"]
    assert len(source.problems()) == 2
    (tmp_path / "0.txt").unlink()
    with pytest.raises(DataError, match="restore it"):
        everything(source)


def test_separated_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("<end>\none\n\nstill one\n<end>\n<end>\ntwo\n<end> not\n")
    (tmp_path / "b.txt").write_bytes(b"three\r\n<end>\r\nfour")
    got = everything(text(tmp_path, separator="<end>", val_fraction=0.5))
    assert got == ["one\n\nstill one", "two\n<end> not", "three", "four"]
    got = everything(text(tmp_path, separator="", val_fraction=0.5))
    assert got == ["<end>\none", "still one\n<end>\n<end>\ntwo\n<end> not", "three\r\n<end>\r\nfour"]


def test_too_little(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\n\nb\n\nc\n\nd")
    with pytest.raises(DataError, match=r'1 documents are too few .*\(20 or more.*data\.separator to the line .*""'):
        text(tmp_path).documents("train")
    assert len(text(tmp_path, separator="", val_fraction=0.25).documents("val")) == 1
    (tmp_path / "empty").mkdir()
    for path, problem in ((tmp_path / "empty", r"holds no \*\.txt"), (tmp_path / "none", "does not exist")):
        with pytest.raises(DataError, match=problem):
            text(path)


def test_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a\n\nb\n\nc")
    known = {text(path, separator=s, val_fraction=f).fingerprint("train") for s in ("", "b") for f in (0.5, 0.25)}
    assert len(known) == 4
    os.utime(path, (1, 1))
    assert text(path, separator="", val_fraction=0.5).fingerprint("train") in known
    path.write_text("a\n\nb\n\nd")
    assert text(path, separator="", val_fraction=0.5).fingerprint("train") not in known
