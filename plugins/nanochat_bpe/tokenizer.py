"""The tokenizer ``bpe``: words by a split pattern, then byte-pair merges inside each word.

Two lone halves of a surrogate pair can't be written in UTF-8: text is read as if they were U+FFFD.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import rustbpe
import tiktoken

from nanochat_bpe.config import BYTES, SPECIAL_TOKENS, BPEConfig
from nanochat_core import CheckpointError, ConfigError, DataError, Tokenizer, TokenizerContext, Tokens

Encoder: TypeAlias = Literal["tiktoken", "gigatoken"]
FORMAT = "nanochat-bpe-1"
SETTINGS, MERGES = "tokenizer.json", "merges.tiktoken"

# tiktoken's regex engine overflows its stack somewhere above 700,000 spaces in a row: longer runs are cut first.
_RUN = 100_000
_LONG_RUN = re.compile(rf"\s{{{_RUN}}}")

# Every kind of character a split pattern has to take a side on. A pattern that drops one of them would lose text.
_PROBE = "It's 12345 wörter, 漢字 -- \t (x_1 != y)\r\n\n  end \x00 🙂  "


class BPETokenizer(Tokenizer):
    """Byte-level BPE.

    Args:
        pattern: regular expression whose matches are encoded one by one.
        tokens: bytes of the ordinary tokens by id, the 256 single bytes first; special tokens follow them.
        encoder: library that encodes; see ``BPEConfig``.

    Raises:
        ConfigError: when the pattern is no regular expression, or leaves out text.
    """

    def __init__(self, pattern: str, tokens: Sequence[bytes], encoder: Encoder = "tiktoken") -> None:
        self._pattern, self._tokens, self._encoder = pattern, tokens, encoder
        self._special = {name: len(tokens) + i for i, name in enumerate(SPECIAL_TOKENS)}
        try:
            self._encoding = tiktoken.Encoding(
                "nanochat",
                pat_str=pattern,
                mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
                special_tokens=self._special,
            )
        except ValueError as error:
            raise ConfigError(f"tokenizer.pattern: no regular expression that tiktoken knows: {error}") from error
        self._encode_piece: Callable[[str], Tokens] = self._by_tiktoken
        if encoder == "gigatoken":
            from nanochat_bpe.fast import make_encoder

            self._encode_piece = make_encoder(pattern, tokens, self._by_tiktoken)
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise ConfigError(
                "tokenizer.pattern: some characters match no part of it and would be lost; "
                r"end it with alternatives such as |\s+|. that take whatever is left"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return BPETokenizer, (self._pattern, self._tokens, self._encoder)

    @property
    def vocab_size(self) -> int:
        return len(self._tokens) + len(self._special)

    @property
    def special_tokens(self) -> Mapping[str, int]:
        return self._special

    def _encode(self, text: str) -> Tokens:
        pieces = _cut_long_runs(text)
        if len(pieces) > 1:
            return np.concatenate([self._encode_piece(piece) for piece in pieces])
        return self._encode_piece(text)

    def _by_tiktoken(self, text: str) -> Tokens:
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
        return self._encoding.decode_bytes(ids)

    def token_bytes(self) -> Tokens:
        return np.array([*map(len, self._tokens), *[0] * len(self._special)], dtype=np.int32)

    @property
    def fingerprint(self) -> str:
        content = [self._pattern.encode(), *(name.encode() for name in self._special), *self._tokens]
        digest = hashlib.sha256(FORMAT.encode())
        for part in content:
            digest.update(len(part).to_bytes(4, "little") + part)
        return digest.hexdigest()

    def save(self, directory: Path) -> None:
        """Write ``merges.tiktoken`` (tiktoken's own format: base64 of the bytes, a space, the id) and
        ``tokenizer.json`` (the rest)."""
        lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(self._tokens)]
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


def _training_text(documents: Iterable[str], config: BPEConfig) -> Iterator[str]:
    left = config.max_chars
    for document in documents:
        text = document[: min(config.doc_cap, left)]
        left -= len(text)
        try:
            text.encode()
        except UnicodeEncodeError:
            text = _mend(text)  # rustbpe refuses surrogates
        yield from _cut_long_runs(text)
        if left <= 0:
            return


def train(documents: Iterable[str], config: BPEConfig) -> BPETokenizer:
    """Learn merges. The same documents give the same tokenizer, whatever the number of threads.

    Raises:
        ConfigError: when the pattern is no regular expression.
        DataError: when the documents are too few for ``vocab_size`` tokens.
    """
    trainer = rustbpe.Tokenizer()
    wanted = config.vocab_size - len(SPECIAL_TOKENS)  # at least 256: below, rustbpe panics
    _check_pattern(config.pattern)
    trainer.train_from_iterator(_training_text(documents, config), wanted, pattern=config.pattern)
    tokens = [bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])]
    if len(tokens) < wanted:
        raise DataError(
            f"tokenizer.vocab_size = {config.vocab_size}: the training documents yield only "
            f"{len(tokens) - BYTES} merges; set it to {len(tokens) + len(SPECIAL_TOKENS)} or less, or give more data"
        )
    return BPETokenizer(config.pattern, tokens, config.encoder)


def _check_pattern(pattern: str) -> None:
    """Try the pattern on no text at all, so that its errors aren't mixed up with those of the documents."""
    try:
        rustbpe.Tokenizer().train_from_iterator(iter(()), BYTES, pattern=pattern)
    except ValueError as error:
        raise ConfigError(f"tokenizer.pattern: no regular expression that rustbpe knows: {error}") from error


def load(directory: Path, encoder: Encoder = "tiktoken") -> BPETokenizer:
    """Read what ``save`` wrote.

    Raises:
        CheckpointError: when a file is missing or damaged.
    """
    try:
        settings = json.loads((directory / SETTINGS).read_text(encoding="utf-8"))
        if settings["format"] != FORMAT:
            raise ValueError(f"its format is {settings['format']!r}, this version reads {FORMAT!r}")
        lines = (directory / MERGES).read_text(encoding="ascii").splitlines()
        tokens = [base64.b64decode(line.split()[0], validate=True) for line in lines]
        tokenizer = BPETokenizer(settings["pattern"], tokens, encoder)
        if tokenizer.fingerprint != settings["fingerprint"]:
            raise ValueError("the files don't belong together: their fingerprint is another")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"the tokenizer in {directory} can't be read ({error}); restore {SETTINGS} and {MERGES} there, "
            f"or start a new run"
        ) from error
    return tokenizer


def build(config: BPEConfig, context: TokenizerContext) -> BPETokenizer:
    """The saved tokenizer if there is one, else a freshly trained one.

    Raises:
        CheckpointError: when the saved one is damaged, or isn't what the config asks for.
        ConfigError, DataError: see ``train``.
    """
    if context.saved is None:
        return train(context.documents(), config)
    tokenizer = load(context.saved, config.encoder)
    for name, found in (("vocab_size", tokenizer.vocab_size), ("pattern", tokenizer._pattern)):
        if found != getattr(config, name):
            raise CheckpointError(
                f"tokenizer.{name} = {getattr(config, name)!r}, but the tokenizer in {context.saved} has {found!r}; "
                f"set tokenizer.{name} to that, or start a new run"
            )
    return tokenizer
