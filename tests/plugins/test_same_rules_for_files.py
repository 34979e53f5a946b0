"""Everything that reads files of data follows the same rules for which files these are."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_bpb.texts import documents
from nanochat_core import DataContext, DataError
from nanochat_parquet.config import ParquetConfig
from nanochat_parquet.source import build as build_parquet
from nanochat_text.config import JsonlConfig, TextConfig
from nanochat_text.source import build_jsonl, build_text


def write(path: Path, text: str) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": [text]}), path)
    else:
        path.write_text(json.dumps({"text": text}) + "\n" if path.suffix == ".jsonl" else text)


def source(build: Callable[..., Any], config: Callable[..., Any]) -> Callable[..., list[str]]:
    def read(place: Path, **options: Any) -> list[str]:
        options = options or {"val_fraction": 0.5}
        made = build(config(path=str(place), **options), DataContext(place.parent / "cache"))
        return sorted([*made.documents("train"), *made.documents("val")])

    return read


def bpb(place: Path) -> list[str]:
    return sorted(documents(place))


# What reads, and the suffix of the files that it takes in a directory.
READERS: dict[str, tuple[Callable[..., list[str]], str]] = {
    "jsonl": (source(build_jsonl, JsonlConfig), ".jsonl"),
    "text": (source(build_text, TextConfig), ".txt"),
    "parquet": (source(build_parquet, ParquetConfig), ".parquet"),
    "bpb": (bpb, ".txt"),
}


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest) -> tuple[Callable[..., list[str]], str]:
    return READERS[request.param]


@pytest.fixture
def data(reader: tuple[Any, str], tmp_path: Path) -> Path:
    """A directory with two files, which hold "a" and "b", and some that are no data."""
    directory = tmp_path / "caf\udce9"  # not UTF-8
    directory.mkdir()
    for name in "ab":
        write(directory / f"{name}{reader[1]}", name)
    (directory / f"._a{reader[1]}").write_bytes(b"\0\5\x16\7")
    (directory / ".cache").mkdir()
    shutil.copy(directory / f"a{reader[1]}", directory / ".cache")
    plain = tmp_path / "data"
    plain.symlink_to(directory)  # an option can't hold a name that is not UTF-8
    return plain


def test_dot_files_and_odd_names(reader: tuple[Callable[..., list[str]], str], data: Path) -> None:
    assert reader[0](data) == ["a", "b"]


@pytest.mark.parametrize("how", ["a link to nothing", "a pipe", "a device", "a link to the same", "a hard link"])
def test_what_is_an_error(reader: tuple[Callable[..., list[str]], str], data: Path, how: str) -> None:
    read, suffix = reader
    path, first = data / f"c{suffix}", data / f"a{suffix}"
    if how == "a link to nothing":
        path.symlink_to("gone")
    elif how == "a pipe":
        os.mkfifo(path)
    elif how == "a device":
        path.symlink_to("/dev/zero")
    elif how == "a link to the same":
        path.symlink_to(first)
    else:
        os.link(first, path)
    with pytest.raises(
        DataError, match=rf"c\{suffix} is (a link to 'gone', which|not a regular file|the same file as)"
    ):
        read(data)


def test_files_for_training_and_for_validation(reader: tuple[Callable[..., list[str]], str], data: Path) -> None:
    read, suffix = reader
    if read is bpb:
        return
    link = data.parent / f"v{suffix}"
    link.symlink_to(data / f"b{suffix}")
    for other in (data / f"b{suffix}", link, data / ".." / "data" / f"b{suffix}"):
        with pytest.raises(DataError, match=r"^val_path: .* is among the training files too"):
            read(data, val_path=str(other))
