"""Damaged and hostile files of data, tokenizers and evaluation bundles: read, or refused with a message."""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import json
import lzma
import random
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.core_bundle import write_bundle
from helpers.fuzzing import FACTOR, inputs, time_limit
from hypothesis import given
from hypothesis import strategies as st

from nanochat_bpe.tokenizer import load as load_bpe
from nanochat_core import DataContext, NanochatError, TokenizerContext
from nanochat_dclm_core.bundle import open_bundle
from nanochat_text.config import JsonlConfig, TextConfig
from nanochat_text.source import build_jsonl, build_text
from nanochat_tiktoken.config import TiktokenConfig
from nanochat_tiktoken.tokenizer import build as build_tiktoken

pytestmark = pytest.mark.fuzz

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}
LINES = b"".join(json.dumps({"text": f"line {i} " * 5, "id": i}).encode() + b"\r\n\n"[i % 3 :] for i in range(40))
PIECES = [b"", b"\0" * 9, b"\xef\xbb\xbf", b"\xff\xfe", b"[", b'{"text": 5}\n', b"\r", b"\x1f\x8b", b"BZh91AY&SY",
          b"\n \t\n",
          b"null", b'"\\ud800"', b"-1", b"99999999999999999999", b"<0x00>", b"  "]  # fmt: skip

# Where a file is changed (a share of its length), how many bytes go, and what comes in their place.
CHANGES = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 40), st.one_of(st.sampled_from(PIECES), st.binary(max_size=20))),
    max_size=4,
)


def changed(data: bytes, changes: list[tuple[float, int, bytes]]) -> bytes:
    for share, gone, put in changes:
        at = int(share * len(data))
        data = data[:at] + put + data[at + gone :]
    return data


@given(st.sampled_from(sorted(COMPRESS)), CHANGES, CHANGES, st.sampled_from(["fail", "skip"]), st.booleans())
@inputs(80)
def test_files_of_text(
    tried: Callable[[str], None], end: str, inner: list, outer: list, on_error: str, is_text: bool
) -> None:
    tried("jsonl and text")
    with tempfile.TemporaryDirectory() as name, time_limit():
        path = Path(name, ("a.txt" if is_text else "a.jsonl") + end)
        path.write_bytes(changed(COMPRESS[end](changed(LINES, inner)), outer))
        context = DataContext(Path(name, "cache"))
        options = {"path": str(path), "val_fraction": 0.5, "on_error": on_error}
        try:
            if is_text:
                source = build_text(TextConfig(**options, separator=""), context)
            else:
                source = build_jsonl(JsonlConfig(**options), context)
            texts = [*source.documents("train"), *source.documents("val")]
        except NanochatError as error:
            assert str(path) in str(error) or "too few" in str(error), error  # noqa: PT017
        else:
            assert "".join(texts).encode() is not None
            assert end or outer or inner or len(texts) == 40 or is_text


READ_PARQUET = """
import sys, pyarrow
from pathlib import Path
from nanochat_core import DataContext, NanochatError
from nanochat_parquet.config import ParquetConfig
from nanochat_parquet.source import build
for path in sys.argv[1:]:
    for on_error in ("fail", "skip"):
        print(path, flush=True)
        try:
            source = build(ParquetConfig(path=path, val_fraction=0.5, on_error=on_error), DataContext(Path("unused")))
            [len(text) for split in ("train", "val") for text in source.documents(split)]
        except NanochatError as error:
            assert path in str(error), error  # noqa: PT017
"""
ABORTS = b"histogram size mismatch"  # an assertion of pyarrow that ends the process; no exception can be caught


def test_parquet_files(tmp_path: Path, tried: Callable[[str], None]) -> None:
    table = pa.table({"text": [f"row {i} " * 9 for i in range(200)]})
    pq.write_table(table, tmp_path / "whole.parquet", row_group_size=50)
    whole = (tmp_path / "whole.parquet").read_bytes()
    rng = random.Random(1 if FACTOR == 1 else None)
    paths = []
    for i in range(100 * FACTOR):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 3))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        paths.append(tmp_path / f"{i}.parquet")
        paths[-1].write_bytes(data)
        tried("parquet")
    while paths:
        done = subprocess.run([sys.executable, "-c", READ_PARQUET, *map(str, paths)], capture_output=True, timeout=600)
        if done.returncode == 0:
            break
        last = Path(done.stdout.decode().splitlines()[-1])
        assert ABORTS in done.stderr, (last, done.stderr.decode()[-3000:])
        paths = paths[paths.index(last) + 1 :]


@given(CHANGES, st.sampled_from([False, True]))
@inputs(40)
def test_files_of_merges(tried: Callable[[str], None], changes: list, saved: bool) -> None:
    tried("merges")
    tokens = [*(bytes([b]) for b in range(256)), b"th", b"the"]
    content = "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens)).encode()
    with tempfile.TemporaryDirectory() as name, time_limit():
        path = Path(name, "merges.tiktoken")
        path.write_bytes(changed(content, changes))
        try:
            if saved:
                settings = {"format": "nanochat-bpe-1", "pattern": r"\s+|\S+"}
                Path(name, "tokenizer.json").write_text(json.dumps(settings))
                tokenizer = load_bpe(Path(name))
            else:
                config = TiktokenConfig(path=path, pattern=r"\s+|\S+")
                tokenizer = build_tiktoken(config, TokenizerContext(documents=list))
        except NanochatError as error:
            assert name in str(error), error  # noqa: PT017
        else:
            assert tokenizer.decode(tokenizer.encode("the <|bos|> \x00é")) == "the <|bos|> \x00é"


@given(CHANGES)
@inputs(40)
def test_tokenizer_json(tried: Callable[[str], None], changes: list) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from nanochat_huggingface.config import HuggingFaceConfig
    from nanochat_huggingface.tokenizer import build

    tried("tokenizer.json")
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    made = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(byte_level.alphabet())}, []))
    made.pre_tokenizer = byte_level(add_prefix_space=False)
    made.add_tokens([tokenizers.AddedToken("<mask>", lstrip=True, rstrip=True, single_word=True)])
    with tempfile.TemporaryDirectory() as name, time_limit():
        path = Path(name, "tokenizer.json")
        path.write_bytes(changed(made.to_str().encode(), changes))
        try:
            tokenizer = build(HuggingFaceConfig(path), TokenizerContext(documents=list))
        except NanochatError as error:
            assert str(error)  # noqa: PT017
        else:
            assert tokenizer.decode(tokenizer.encode("a <mask> b <|bos|>\x00é")) == "a <mask> b <|bos|>\x00é"


@given(st.data(), CHANGES, st.booleans())
@inputs(40)
def test_bundles(tried: Callable[[str], None], data: st.DataObject, changes: list, zipped: bool) -> None:
    tried("bundles")
    with tempfile.TemporaryDirectory() as name, time_limit():
        root = Path(name, "bundle")
        root.mkdir()
        write_bundle(root)
        files = sorted(path for path in root.rglob("*") if path.is_file())
        path = data.draw(st.sampled_from(files))
        if zipped:
            content = io.BytesIO()
            with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
                for each in files:
                    archive.write(each, each.relative_to(root))
            path, root = Path(name, "bundle.zip"), Path(name, "bundle.zip")
            path.write_bytes(content.getvalue())
        path.write_bytes(changed(path.read_bytes(), changes))
        try:
            bundle = open_bundle(root, Path(name))
            for task in bundle.tasks:
                bundle.examples(task)
        except NanochatError as error:
            assert str(root) in str(error), error  # noqa: PT017
