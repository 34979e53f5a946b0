"""Tokens on disk: what was tokenized once is read back memory-mapped.

A cache belongs to one training split and one tokenizer (their fingerprints name its directory). Every process appends
to a segment file of its own, block by block; a block holds some documents, in whatever order they were asked for, and
checksums. Readers index all segments when they start. Nothing is ever changed in place: a block that was cut short by a
crash ends its segment, and one whose checksum is wrong is left out, so that its documents are tokenized again.

A segment is a sequence of blocks, all integers little-endian:

    header   MAGIC, number of documents, bytes of a token (2 or 4), number of tokens, checksum of the rest, checksum of
             the header so far
    rest     document numbers int64 [n], their lengths in tokens int64 [n], the tokens one after the other, padding to 8
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from nanochat_core.data.packing import TokenSource
from nanochat_core.interfaces.tokenizer import Tokenizer
from nanochat_core.interfaces.types import Tokens

FORMAT = "tokens-1"
MAGIC = b"NCTK"
HEADER = struct.Struct("<4sIIIQII")  # with 4 bytes of padding, so that all that follows is aligned
SEGMENT_BYTES = 2**30  # size after which a new segment is begun

Ints = npt.NDArray[np.int64]


def _say(line: str) -> None:
    print(line, file=sys.stderr)


@attrs.frozen
class _Block:
    """A block in a segment that is mapped into memory."""

    segment: npt.NDArray[np.uint8]
    start: int  # of the rest, in bytes
    documents: int
    width: int
    tokens: int
    checksum: int

    @property
    def end(self) -> int:
        return self.start + _rest_bytes(self.documents, self.width, self.tokens)

    def is_sound(self) -> bool:
        return zlib.crc32(self.segment[self.start : self.end].data) == self.checksum

    def columns(self) -> tuple[Ints, Ints]:
        """Document numbers and lengths."""
        middle = self.start + 8 * self.documents
        numbers = self.segment[self.start : middle].view("<i8")
        return numbers, self.segment[middle : middle + 8 * self.documents].view("<i8")

    def text(self) -> Tokens:
        """All its tokens, uint16 or int32."""
        start = self.start + 16 * self.documents
        kind = "<u2" if self.width == 2 else "<i4"
        return self.segment[start : start + self.width * self.tokens].view(kind)


def _rest_bytes(documents: int, width: int, tokens: int) -> int:
    size = 16 * documents + width * tokens
    return size + -size % 8


def _scan(path: Path, position: int = 0) -> list[_Block]:
    """The whole blocks of a segment from ``position`` on, up to the first that was cut short."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < HEADER.size:
                return []
            segment: npt.NDArray[np.uint8] = np.memmap(file, dtype=np.uint8, mode="r", shape=(size,))
    except OSError:  # it has been removed
        return []
    blocks: list[_Block] = []
    while position + HEADER.size <= size:
        header = segment[position : position + HEADER.size].tobytes()
        magic, documents, width, _, tokens, checksum, own_checksum = HEADER.unpack(header)
        if magic != MAGIC or zlib.crc32(header[:-4]) != own_checksum:
            break
        block = _Block(segment, position + HEADER.size, documents, width, tokens, checksum)
        if block.end > size:
            break
        blocks.append(block)
        position = block.end
    return blocks


NOWHERE, WRITTEN = -1, -2  # instead of a block: tokens that aren't in the cache; that this process has just written


class TokenCache:
    """Tokens of documents: from disk if they are cached, otherwise from ``source``, and cached from then on.

    Args:
        directory: of this split and tokenizer; created if absent.
        source: provides the tokens that are not in the cache.
        vocab_size: of the tokenizer; up to 2^16 a token takes two bytes instead of four.
        report: prints a line; called at most once, when the cache can't be written.
    """

    def __init__(
        self, directory: Path, source: TokenSource, vocab_size: int, report: Callable[[str], None] = _say
    ) -> None:
        self._directory, self._source, self._report = directory, source, report
        self._dtype: Any = np.dtype("<u2" if vocab_size <= 2**16 else "<i4")
        self._lock = threading.Lock()  # held while anything below changes
        self._blocks: list[_Block] = []
        self._checked: set[int] = set()
        # where each document is: its block, first token in it, number of tokens
        self._block = np.full(len(source), NOWHERE, dtype=np.int32)
        self._start = np.zeros(len(source), dtype=np.int64)
        self._length = np.zeros(len(source), dtype=np.int32)
        self._segment: Path | None = None  # the file this process appends to
        self._written: dict[Path, int] = {}  # segments of this process, and how many bytes of each are indexed
        self._can_write = True
        for path in sorted(directory.glob("*.tokens")):
            for block in _scan(path):
                self._add(block)

    def __len__(self) -> int:
        return len(self._source)

    @property
    def num_cached(self) -> int:
        """Documents that are in the cache."""
        return int(np.count_nonzero(self._block != NOWHERE))

    def read(self, indices: range) -> Sequence[Tokens]:
        found = [self._find(document) for document in indices]
        missing = [i for i, tokens in enumerate(found) if tokens is None]
        if missing:
            asked = indices[missing[0] : missing[-1] + 1]  # one slice, though some in the middle may be cached
            made = self._source.read(asked)
            found[missing[0] : missing[-1] + 1] = made
            self._write(asked, made)
        return [tokens for tokens in found if tokens is not None]

    def _find(self, document: int) -> Tokens | None:
        if self._block[document] == WRITTEN:
            self._index_written()
        index = int(self._block[document])
        if index < 0:
            return None
        block = self._blocks[index]
        if index not in self._checked:
            if not block.is_sound():
                with self._lock:
                    self._block[self._block == index] = NOWHERE
                return None
            self._checked.add(index)
        start = int(self._start[document])
        return block.text()[start : start + int(self._length[document])]

    def _add(self, block: _Block) -> None:
        """Add a block's documents to the index."""
        numbers, lengths = block.columns()
        if not len(numbers) or numbers.min() < 0 or numbers.max() >= len(self) or lengths.sum() != block.tokens:
            return  # damaged
        self._blocks.append(block)
        self._start[numbers], self._length[numbers] = np.cumsum(lengths) - lengths, lengths
        self._block[numbers] = len(self._blocks) - 1

    def _index_written(self) -> None:
        """Map what this process has written since the last time."""
        with self._lock:
            for path, position in self._written.items():
                for block in _scan(path, position):
                    self._add(block)
                    self._written[path] = block.end
            self._block[self._block == WRITTEN] = NOWHERE  # the file has been removed

    def _write(self, documents: range, made: Sequence[Tokens]) -> None:
        """Append a block. If that fails, training continues without the cache."""
        numbers = np.arange(documents.start, documents.stop, documents.step, dtype="<i8")
        lengths = np.array([len(tokens) for tokens in made], dtype="<i8")
        tokens = np.concatenate(made).astype(self._dtype)
        rest = numbers.tobytes() + lengths.tobytes() + tokens.tobytes()
        rest += bytes(-len(rest) % 8)
        header = HEADER.pack(MAGIC, len(numbers), self._dtype.itemsize, 0, len(tokens), zlib.crc32(rest), 0)[:-4]
        header += zlib.crc32(header).to_bytes(4, "little")
        with self._lock:
            if not self._can_write:
                return
            try:
                self._append(header + rest)
                self._block[numbers] = WRITTEN
            except OSError as error:
                self._can_write = False
                self._report(f"the token cache {self._directory} can't be written ({error}); continuing without it")

    def _append(self, data: bytes) -> None:
        if self._segment is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._segment = self._directory / f"{secrets.token_hex(8)}.tokens"
            self._written[self._segment] = 0
        with self._segment.open("ab", buffering=0) as file:
            if file.write(data) != len(data):
                raise OSError("the disk is full")
            if file.tell() >= SEGMENT_BYTES:
                self._segment = None


def open_cache(home: Path, source: TokenSource, documents_fingerprint: str, tokenizer: Tokenizer) -> TokenCache:
    """The cache of a split and a tokenizer, under ``home/tokens``."""
    parts = {"format": FORMAT, "documents": documents_fingerprint, "tokenizer": tokenizer.fingerprint}
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    return TokenCache(home / "tokens" / key, source, tokenizer.vocab_size)
