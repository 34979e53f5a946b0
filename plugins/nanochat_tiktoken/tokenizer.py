"""The tokenizer ``tiktoken``: an encoding that somebody has published.

Two lone halves of a surrogate pair can't be written in UTF-8: text is read as if they were U+FFFD.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import threading
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import tiktoken.load

from nanochat_core import CheckpointError, ConfigError, DataError, Tokenizer, TokenizerContext, Tokens
from nanochat_tiktoken.config import SPECIAL_TOKENS, TiktokenConfig

FORMAT = "nanochat-tiktoken-1"
SETTINGS, MERGES = "tokenizer.json", "merges.tiktoken"

# tiktoken's regex engine overflows its stack somewhere above 700,000 spaces in a row: longer runs are cut first.
_RUN = 100_000
_LONG_RUN = re.compile(rf"\s{{{_RUN}}}")
_PROBE = "It's 12345 wörter, 漢字 -- \t (x_1 != y)\r\n\n  end \x00 🙂  "


class TiktokenTokenizer(Tokenizer):
    """An encoding of tiktoken. Its ids stay what they are; special tokens of ours follow unless it has them.

    Args:
        pattern: regular expression whose matches are encoded one by one.
        ranks: id of each ordinary token.
        special: id of each special token of the encoding.

    Raises:
        ConfigError: when the pattern is no regular expression, or leaves out text.
    """

    def __init__(self, pattern: str, ranks: Mapping[bytes, int], special: Mapping[str, int]) -> None:
        self._pattern, self._ranks, self._own_special = pattern, dict(ranks), dict(special)
        self._special = dict(special)
        if "<|bos|>" not in special:
            first = max([*ranks.values(), *special.values()]) + 1
            self._special |= {name: first + i for i, name in enumerate(SPECIAL_TOKENS)}
        self._bytes = [b""] * (max([*ranks.values(), *self._special.values()]) + 1)  # some ids may mean nothing
        for token, rank in ranks.items():
            self._bytes[rank] = token
        self._names = {rank: name.encode() for name, rank in self._special.items()}
        try:
            self._encoding = tiktoken.Encoding(
                "nanochat", pat_str=pattern, mergeable_ranks=self._ranks, special_tokens={}
            )
        except ValueError as error:
            raise ConfigError(f"tokenizer.pattern: no regular expression that tiktoken knows: {error}") from error
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise ConfigError("tokenizer.pattern: some characters match no part of it and would be lost")

    def __reduce__(self) -> tuple[Any, ...]:
        return TiktokenTokenizer, (self._pattern, self._ranks, self._own_special)

    @property
    def vocab_size(self) -> int:
        return len(self._bytes)

    @property
    def special_tokens(self) -> Mapping[str, int]:
        return self._special

    def _encode(self, text: str) -> Tokens:
        pieces = _cut_long_runs(text)
        if len(pieces) > 1:
            return np.concatenate([self._encode(piece) for piece in pieces])
        try:
            ids = self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            ids = self._encoding.encode_to_numpy(_mend(text), disallowed_special=())
        return ids.view(np.int32)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._encode(text).tolist()
        return ids

    def encode_documents(self, texts: Sequence[str]) -> list[Tokens]:
        bos = np.array([self.bos_id], dtype=np.int32)
        return [np.concatenate((bos, self._encode(text))) for text in texts]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join([self._names.get(i, self._bytes[i]) for i in ids])

    def token_bytes(self) -> Tokens:
        return np.array([len(token) for token in self._bytes], dtype=np.int32)

    @property
    def fingerprint(self) -> str:
        parts = [FORMAT.encode(), self._pattern.encode()]
        parts += [f"{name} {rank}".encode() for name, rank in sorted(self._special.items())]
        parts += self._bytes
        digest = hashlib.sha256()
        for part in parts:
            digest.update(len(part).to_bytes(4, "little") + part)
        return digest.hexdigest()

    def save(self, directory: Path) -> None:
        """Write ``merges.tiktoken`` (tiktoken's own format: base64 of the bytes, a space, the id) and
        ``tokenizer.json`` (the rest)."""
        lines = [
            f"{base64.b64encode(token).decode()} {rank}\n"
            for token, rank in sorted(self._ranks.items(), key=lambda pair: pair[1])
        ]
        (directory / MERGES).write_text("".join(lines), encoding="ascii", newline="\n")
        settings = {
            "format": FORMAT,
            "vocab_size": self.vocab_size,
            "pattern": self._pattern,
            "special_tokens": self._special,
            "merges": MERGES,
            "fingerprint": self.fingerprint,
        }
        (directory / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8", newline="\n")


def _mend(text: str) -> str:
    """Surrogate pairs joined, lone ones replaced by U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _cut_long_runs(text: str) -> list[str]:
    """``text``, cut inside white space that is too long for the regex engine."""
    if len(text) <= _RUN:
        return [text]
    cuts = [0, *(match.end() for match in _LONG_RUN.finditer(text)), len(text)]
    return [text[start:stop] for start, stop in pairwise(cuts) if start < stop]


class _NotInCache(Exception):
    """tiktoken wants to download something."""


_no_downloads = threading.Lock()


def named(encoding: str) -> TiktokenTokenizer:
    """An encoding that tiktoken knows by name, from its cache.

    Raises:
        ConfigError: when there is no encoding of that name.
        DataError: when it isn't in tiktoken's cache.
    """
    if encoding not in tiktoken.list_encoding_names():
        raise ConfigError(
            f"tokenizer.encoding: tiktoken knows no {encoding!r}; it has {', '.join(tiktoken.list_encoding_names())}"
        )

    def refuse(blobpath: str) -> bytes:
        raise _NotInCache(blobpath)

    with _no_downloads:  # tiktoken has no way to ask for what is there only
        fetch = tiktoken.load.read_file
        tiktoken.load.read_file = refuse
        try:
            found = tiktoken.get_encoding(encoding)
        except _NotInCache as missing:
            raise DataError(
                f"tokenizer.encoding: {encoding} isn't in tiktoken's cache ({missing} is missing). With a network, "
                f"fetch it: python -c \"import tiktoken; tiktoken.get_encoding('{encoding}')\"; "
                f"without, copy the cache from another machine and name it in TIKTOKEN_CACHE_DIR"
            ) from None
        finally:
            tiktoken.load.read_file = fetch
    return TiktokenTokenizer(found._pat_str, found._mergeable_ranks, found._special_tokens)


def read_merges(path: Path) -> dict[bytes, int]:
    """Ranks by token. ``path``: lines of base64, a space, and the rank.

    Raises:
        ValueError: when it is something else, or lacks one of the 256 bytes.
    """
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line:
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error) as error:
                raise ValueError(f"line {number} isn't base64 and a number ({error})") from error
    if any(bytes([b]) not in ranks for b in range(256)):
        raise ValueError("not all 256 bytes are among its tokens")
    if len(set(ranks.values())) < len(ranks) or min(ranks.values()) < 0:
        raise ValueError("two tokens have the same number, or one is negative")
    return ranks


def load(directory: Path) -> TiktokenTokenizer:
    """Read what ``save`` wrote.

    Raises:
        CheckpointError: when a file is missing or damaged.
    """
    try:
        settings = json.loads((directory / SETTINGS).read_text(encoding="utf-8"))
        if settings["format"] != FORMAT:
            raise ValueError(f"its format is {settings['format']!r}, this version reads {FORMAT!r}")
        tokenizer = TiktokenTokenizer(settings["pattern"], read_merges(directory / MERGES), settings["special_tokens"])
        if tokenizer.fingerprint != settings["fingerprint"]:
            raise ValueError("the files don't belong together: their fingerprint is another")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(
            f"the tokenizer in {directory} can't be read ({error}); restore {SETTINGS} and {MERGES} there, "
            f"or start a new run"
        ) from error
    return tokenizer


def build(config: TiktokenConfig, context: TokenizerContext) -> TiktokenTokenizer:
    """The saved tokenizer if there is one, else what the config names.

    Raises:
        CheckpointError: when the saved one is damaged.
        ConfigError, DataError: when what the config names is missing or no encoding.
    """
    if context.saved is not None:
        return load(context.saved)
    if config.encoding is not None:
        return named(config.encoding)
    assert config.path is not None
    assert config.pattern is not None
    try:
        ranks = read_merges(config.path)
    except ValueError as error:
        raise ConfigError(f"tokenizer.path: {config.path} is no file of merges: {error}") from error
    return TiktokenTokenizer(config.pattern, ranks, {})
