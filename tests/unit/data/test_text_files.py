"""What is in files of text: encodings, compressed files, JSON lines, damage."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
from collections.abc import Callable

import pyarrow as pa
import pytest

from nanochat_core import Damage, content_problem, decompressed, json_lines, parse_text


def zstd(data: bytes) -> bytes:
    compressed: bytes = pa.compress(data, codec="zstd", asbytes=True)
    return compressed


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}
TEXT = b"".join(json.dumps({"text": random.Random(i).randbytes(20).hex()}).encode() + b"\n" for i in range(200))
BOM = b"\xef\xbb\xbf"


def read(data: bytes, name: str = "") -> tuple[bytes, str]:
    """What is read before the damage, and the damage."""
    content = b""
    try:
        for piece in decompressed(io.BytesIO(data), name):
            content += piece
    except Damage as error:
        return content, str(error)
    return content, ""


@pytest.mark.parametrize("compress", COMPRESS.values(), ids=COMPRESS)
@pytest.mark.parametrize("text", [b"", b"x", TEXT])
def test_compressed_whatever_the_name(compress: Callable[[bytes], bytes], text: bytes) -> None:
    assert read(compress(text)) == (text, "")
    assert read(compress(text) + compress(text), "a.jsonl") == (text + text, "")
    assert read(compress(BOM + text)) == (text, "")
    if compress is not zstd:
        assert read(compress(BOM + text) + compress(BOM + text) + bytes(600)) == (text + text, "")


@pytest.mark.parametrize("compress", COMPRESS.values(), ids=COMPRESS)
def test_all_that_precedes_a_damage_is_read(compress: Callable[[bytes], bytes]) -> None:
    whole = compress(TEXT)
    content, problem = read(whole + b"garbage")
    assert content == TEXT
    assert problem
    for cut in (3, len(whole) // 2, len(whole) - 1):
        content, problem = read(whole[:cut], f"a.{next(k for k, v in COMPRESS.items() if v is compress)}")
        assert TEXT.startswith(content)
        assert problem


def test_a_wrong_checksum_loses_nothing() -> None:
    whole = bytearray(gzip.compress(TEXT))
    whole[-6] ^= 1
    content, problem = read(bytes(whole))
    assert content == TEXT
    assert "incorrect data check" in problem
    half = gzip.compress(TEXT)[:-4000]
    assert len(read(half)[0]) > len(TEXT) // 8


def test_what_is_not_compressed() -> None:
    assert read(b"BZh is a text") == (b"BZh is a text", "")
    assert "not compressed with gzip" in read(b"plain", "a.GZ")[1]
    assert "is empty" in read(b"", "a.gz")[1]
    assert read(BOM + b"plain") == (b"plain", "")


def test_what_grows_out_of_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanochat_core.data import decompression

    monkeypatch.setattr(decompression, "LARGE", 2**20)
    bomb = gzip.compress(bytes(2**23))
    assert "grows to more than 500 times its size" in read(bomb)[1]


@pytest.mark.parametrize(
    ("head", "problem"),
    [
        ('{"text": "a"}\n'.encode("utf-16"), "UTF-16"),
        ('{"text": "a"}\n'.encode("utf-16-le"), "UTF-16LE"),
        ('{"text": "a"}\n'.encode("utf-16-be"), "UTF-16BE"),
        ('{"text": "a"}\n'.encode("utf-32"), "UTF-32"),
        (b'[{"text": "a"}, {"text": "b"}]', "one object per line"),
        (b'[\n  {"text": "a"}\n]\n', "one object per line"),
        (b'{\n  "text": "a"\n}\n', "one object per line"),
        (b'{"text": "a"}\r{"text": "b"}\r', "carriage return"),
        (gzip.compress(b"x", mtime=0), "compressed twice"),
        (b'{"text": "a"}\n', ""),
        (BOM + b'\r\n{"text": "a"}\r\n', ""),
        (b'["not an object"]\n{"text": "a"}\n', ""),
        (b"", ""),
    ],
)
def test_what_the_first_bytes_say(head: bytes, problem: str) -> None:
    found = content_problem(head, json_lines=True)
    assert problem in found
    assert bool(found) == bool(problem)


def lines(data: bytes, **options: int) -> list[tuple[int, object]]:
    return list(json_lines(io.BytesIO(data), **options))


def test_json_lines() -> None:
    assert lines(b' \t\r\n{"a": 1}\r\n\n' + BOM + b"2\n  \n3") == [(2, {"a": 1}), (4, 2), (6, 3)]
    for data, message in ((b"1\n{\n", "line 2 "), (b"1\n\n" + b"[" * 100_000, "line 3 .*nested too deeply")):
        with pytest.raises(ValueError, match=message):
            lines(data)
    with pytest.raises(ValueError, match="line 2 has more than the 50 bytes"):
        lines(b"1\n" + b" " * 100, limit=50)


def test_text_names_its_encoding() -> None:
    assert parse_text(BOM + "ä".encode()) == "ä"
    with pytest.raises(ValueError, match="UTF-16"):
        parse_text("ä".encode("utf-16"))
    with pytest.raises(ValueError, match="utf-8"):
        parse_text(b"\xff")
