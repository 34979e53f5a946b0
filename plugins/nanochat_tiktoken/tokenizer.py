"""The tokenizer ``tiktoken``: a published encoding.

Unpaired surrogates can't be written in UTF-8: each is read as U+FFFD.

Like ``bpe`` it encodes with the library tiktoken. Both repeat the few lines that call it: plugins don't import each
other, and the core uses no tokenizer library.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import tiktoken.load

from nanochat_core import (
    LARGEST_VOCABULARY,
    ConfigError,
    DataError,
    PerThread,
    TableTokenizer,
    TokenizerContext,
    Tokens,
    encode_by_pieces,
    load_table_tokenizer,
    read_regular,
    require_exact,
    special_tokens_from,
)
from nanochat_tiktoken.config import TiktokenConfig

MERGES = "merges.tiktoken"
LARGEST_FILE = 2**29  # bytes; the largest published ones have some 2**25


class TiktokenTokenizer(TableTokenizer):
    """An encoding of tiktoken. It keeps its ids; our special tokens follow unless it has them.

    Args:
        pattern: regular expression whose matches are encoded one by one.
        ranks: id of each ordinary token.
        special: id of each special token of the encoding.

    Raises:
        ConfigError: when the pattern is not a regular expression, or some text does not match it.
    """

    format = "nanochat-tiktoken-1"

    def __init__(self, pattern: str, ranks: Mapping[bytes, int], special: Mapping[str, int]) -> None:
        tokens = [b""] * (max(ranks.values()) + 1)  # some ids may be unused
        for token, rank in ranks.items():
            tokens[rank] = token
        if set(special.values()) & set(ranks.values()) or len(set(special.values())) < len(special):
            raise ValueError("a special token has the id of another token")
        super().__init__(tokens, special_tokens_from(max([*ranks.values(), *special.values()]) + 1, special))
        self._pattern, self._ranks, self._own_special = pattern, dict(ranks), dict(special)
        own_ranks, all_special = self._ranks, self._special
        self._encodings = PerThread(
            lambda: tiktoken.Encoding(
                "nanochat", pat_str=pattern, mergeable_ranks=own_ranks, special_tokens=all_special
            )
        )
        try:
            self._encodings.get()
        except ValueError as error:
            raise ConfigError(
                f"it is not a regular expression that tiktoken can use: {error}", key="pattern"
            ) from error
        if not self.keeps_text():
            raise ConfigError(
                "some characters match no part of it and would be lost; use the encoding's own pattern", key="pattern"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return TiktokenTokenizer, (self._pattern, self._ranks, self._own_special)

    def encode_array(self, text: str) -> Tokens:
        return encode_by_pieces(self._by_tiktoken, text)

    def _by_tiktoken(self, text: str) -> Tokens:
        return self._encodings.get().encode_to_numpy(text, disallowed_special=()).view(np.int32)

    @property
    def fingerprint(self) -> str:
        parts = [self.format.encode(), self._pattern.encode()]
        parts += [f"{name} {rank}".encode() for name, rank in sorted(self._special.items())]
        parts += self._bytes
        digest = hashlib.sha256()
        for part in parts:
            digest.update(len(part).to_bytes(4, "little") + part)
        return digest.hexdigest()

    def files(self) -> Mapping[str, bytes]:
        """The merges in tiktoken's own format: base64 of the bytes, a space, the id."""
        ranked = sorted(self._ranks.items(), key=lambda pair: pair[1])
        lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranked]
        return {MERGES: "".join(lines).encode()}

    def settings(self) -> Mapping[str, Any]:
        return {"pattern": self._pattern, "merges": MERGES}


def from_name(name: str) -> TiktokenConfig | None:
    """The config for an encoding of tiktoken by name; None when there is no such encoding."""
    return TiktokenConfig(encoding=name) if name in tiktoken.list_encoding_names() else None


class _NotInCache(Exception):
    """tiktoken tried to download a file."""


_no_downloads = threading.Lock()


def named(encoding: str) -> TiktokenTokenizer:
    """Load an encoding of tiktoken by name from its cache, without a download.

    Raises:
        ConfigError: when there is no encoding of that name.
        DataError: when it isn't in tiktoken's cache.
    """
    if encoding not in tiktoken.list_encoding_names():
        raise ConfigError(
            f"tiktoken has no encoding {encoding!r}; it has {', '.join(tiktoken.list_encoding_names())}", key="encoding"
        )

    def refuse(blobpath: str) -> bytes:
        raise _NotInCache(blobpath)

    with _no_downloads:  # tiktoken has no option that forbids downloads
        fetch = tiktoken.load.read_file
        tiktoken.load.read_file = refuse
        try:
            loaded = tiktoken.get_encoding(encoding)
        except _NotInCache as missing:
            raise DataError(
                f"{encoding} isn't in tiktoken's cache ({missing} is missing). With a network, "
                f"download it: python -c \"import tiktoken; tiktoken.get_encoding('{encoding}')\"; "
                f"without, copy the cache from another machine and name it in TIKTOKEN_CACHE_DIR",
                key="encoding",
            ) from None
        finally:
            tiktoken.load.read_file = fetch
    return TiktokenTokenizer(loaded._pat_str, loaded._mergeable_ranks, loaded._special_tokens)


def read_merges(path: Path) -> dict[bytes, int]:
    """Read a file of merges, whose lines are a token in base64, a space, and its rank. Returns ranks by token.

    Raises:
        OSError: when it can't be read, or is very large.
        ValueError: when its format is different, ranks are repeated or negative, or one of the 256 bytes is missing.
    """
    ranks: dict[bytes, int] = {}
    content = read_regular(path, LARGEST_FILE)
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if line:
            try:
                word, rank = line.split()
                token = base64.b64decode(word, validate=True)
                if token in ranks or not token:
                    raise ValueError("the token is empty or repeated")
                ranks[token] = int(rank)
            except (ValueError, binascii.Error) as error:
                raise ValueError(f"line {number} isn't base64 and a number ({error})") from error
    if any(bytes([b]) not in ranks for b in range(256)):
        raise ValueError("not all 256 bytes are among its tokens")
    if len(set(ranks.values())) < len(ranks) or min(ranks.values()) < 0:
        raise ValueError("two tokens have the same rank, or a rank is negative")
    if max(ranks.values()) >= LARGEST_VOCABULARY:
        raise ValueError(f"a rank is {max(ranks.values())}; at most {LARGEST_VOCABULARY - 1} are supported")
    return ranks


def load(directory: Path) -> TiktokenTokenizer:
    """Load a tokenizer from a directory that ``save`` wrote.

    Raises:
        CheckpointError: when a file is missing or damaged.
    """

    def make(settings: Mapping[str, Any]) -> TiktokenTokenizer:
        return TiktokenTokenizer(settings["pattern"], read_merges(directory / MERGES), settings["special_tokens"])

    return load_table_tokenizer(TiktokenTokenizer, directory, make)


def build(config: TiktokenConfig, context: TokenizerContext) -> TiktokenTokenizer:
    """Load the saved tokenizer if there is one; otherwise the encoding or file of the config.

    Raises:
        CheckpointError: when the saved tokenizer is damaged.
        ConfigError: when there is no such encoding, or file or pattern are not valid.
        DataError: when the encoding isn't in tiktoken's cache.
    """
    if context.saved is not None:
        return load(context.saved)
    if config.encoding is not None:
        tokenizer = named(config.encoding)
        require_exact(tokenizer, "encoding", "use another encoding")
        return tokenizer
    assert config.path is not None
    assert config.pattern is not None
    try:
        ranks = read_merges(config.path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{config.path} is not a file of merges: {error}", key="path") from error
    tokenizer = TiktokenTokenizer(config.pattern, ranks, {})
    require_exact(tokenizer, "pattern", "use the encoding's own pattern")
    return tokenizer
