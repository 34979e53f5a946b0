"""What is in files of text: encodings, byte-order marks, JSON lines. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from nanochat_core.data.decompression import Damage, compression, decompressed
from nanochat_core.files import open_regular, shorten

LONGEST_DOCUMENT = 2**28  # bytes
JSON_SPACE = b" \t\r\n"

MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
STARTS = {b"{\0": "UTF-16LE", b"[\0": "UTF-16LE", b"\0{": "UTF-16BE", b"\0[": "UTF-16BE"}  # of JSON without a mark


def content_problem(head: bytes, *, json_lines: bool = False) -> str:
    """Return why a file that begins with ``head`` is not UTF-8 text, nor JSON lines; empty if it may be.

    Args:
        head: its first bytes, some thousand if it has so many, decompressed.
        json_lines: whether it must hold one JSON object per line.
    """
    for start, name in {**MARKS, **(STARTS if json_lines else {})}.items():
        if head.startswith(start):
            return f"it is {name}, not UTF-8: convert it, as with iconv -f {name} -t UTF-8"
    if compression(head):
        return f"it is compressed twice, the second time with {compression(head)}: decompress it"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip(JSON_SPACE)
    if json_lines and b"\r" in text.rstrip(JSON_SPACE) and b"\n" not in head:
        return "its lines end with a carriage return alone: convert it, as with tr '\\r' '\\n'"
    first, newline, rest = text.partition(b"\n")
    first = first.rstrip(JSON_SPACE)
    spread = first in (b"[", b"{", b"[{") or (first.startswith(b"[") and not (newline and rest.lstrip(JSON_SPACE)))
    if json_lines and (spread or (first.startswith(b"[") and first.endswith(b","))):
        return "it holds JSON that is not one object per line: convert it, as with jq -c '.[]?' (an array) or jq -c ."
    return ""


def parse_text(data: bytes) -> str:
    """Decode UTF-8, without a byte-order mark.

    Raises:
        ValueError: when it is not UTF-8; the message names an encoding that its first bytes give away.
    """
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError:
        problem = content_problem(data[:4096])
        if problem:
            raise ValueError(problem) from None
        raise


def parse_json(data: bytes) -> Any:
    """Parse JSON in UTF-8, without a byte-order mark.

    Raises:
        ValueError: when it is not JSON, not UTF-8, or nested too deeply.
    """
    try:
        return json.loads(parse_text(data))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def field_text(value: Any, field: str) -> str:
    """Return the text in a field of a JSON object; null is an empty text.

    Raises:
        ValueError: when there is no such field, or it does not hold text that UTF-8 can hold.
    """
    if not isinstance(value, dict):
        raise ValueError(f"no field {field!r}: it is not an object")
    if field not in value:
        has = ", ".join(shorten(key) for key in list(value)[:5])
        raise ValueError(f"no field {shorten(field)}: it has {has or 'none'}")
    text = value[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"field {shorten(field)} holds {type(text).__name__}, not a string")
    text.encode()  # raises for unpaired surrogates
    return text


def read_text(path: Path, limit: int = LONGEST_DOCUMENT) -> str:
    """Return the text in a file, which may be compressed.

    Raises:
        OSError: when it can't be read, or is not a regular file.
        ValueError: when it is not UTF-8, is damaged, or has more than ``limit`` bytes.
    """
    content = bytearray()
    with open_regular(path) as file:
        for piece in decompressed(file, path.name):
            content += piece
            if len(content) > limit:
                raise ValueError(f"it has more than the {limit:,} bytes that one document may have: split it")
    return parse_text(bytes(content))


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each line of a file of JSON lines, which may be compressed. See ``json_lines``."""
    with open_regular(path) as file:
        yield from json_lines(file, path.name)


def json_lines(file: BinaryIO, name: str = "", limit: int = LONGEST_DOCUMENT) -> Iterator[tuple[int, Any]]:
    """Yield number (from 1 on) and value of each line. Lines of nothing but white space are left out.

    Args:
        file: opened for reading, at its start, maybe compressed.
        name: its name.
        limit: bytes that a line may have.

    Raises:
        ValueError: when a line can't be read; the message has its number.
        OSError: when the file can't be read.
    """
    number, pending, first = 0, b"", True
    for piece in decompressed(file, name):
        *lines, pending = (pending + piece).split(b"\n")
        if first and (problem := content_problem((pending if not lines else piece)[:65536], json_lines=True)):
            raise Damage(problem)
        first = False
        for line in lines:
            number += 1
            yield from _json_line(number, line)
        if len(pending) > limit:
            raise ValueError(f"line {number + 1} has more than the {limit:,} bytes that one may have")
    yield from _json_line(number + 1, pending)


def _json_line(number: int, line: bytes) -> Iterator[tuple[int, Any]]:
    if line.removeprefix(b"\xef\xbb\xbf").strip(JSON_SPACE):
        try:
            yield number, parse_json(line)
        except ValueError as error:
            raise ValueError(f"line {number} can't be read ({error})") from error
