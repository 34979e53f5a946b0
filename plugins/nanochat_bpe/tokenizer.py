"""The tokenizer ``bpe``: words by a split pattern, then byte-pair merges inside each word.

Unpaired surrogates can't be written in UTF-8: each is read as U+FFFD.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import rustbpe
import tiktoken

from nanochat_bpe.config import BYTES, BPEConfig
from nanochat_core import (
    SPECIAL_TOKENS,
    CheckpointError,
    ConfigError,
    DataError,
    PerThread,
    TableTokenizer,
    TokenizerContext,
    Tokens,
    checked_bytes,
    cut_long_runs,
    encode_by_pieces,
    load_table_tokenizer,
    read_regular,
    require_exact,
    special_tokens_from,
    well_formed,
)

Encoder: TypeAlias = Literal["tiktoken", "gigatoken"]
MERGES = "merges.tiktoken"
LARGEST_FILE = 2**29  # bytes; the largest published ones have some 2**25


class BPETokenizer(TableTokenizer):
    """A byte-level BPE tokenizer.

    Args:
        pattern: regular expression whose matches are encoded one by one.
        tokens: bytes of the ordinary tokens by id, the 256 single bytes first; special tokens follow them.
        encoder: library that encodes; both give the same tokens.

    Raises:
        ConfigError: when the pattern is not a regular expression or some text does not match it; when gigatoken is the
            encoder and isn't installed or doesn't support the pattern.
    """

    format = "nanochat-bpe-1"

    def __init__(self, pattern: str, tokens: Sequence[bytes], encoder: Encoder = "tiktoken") -> None:
        super().__init__(tokens, special_tokens_from(len(tokens)))
        self._pattern, self._tokens, self._encoder = pattern, tokens, encoder
        ranks, special = {token: rank for rank, token in enumerate(tokens)}, self._special
        self._encodings = PerThread(
            lambda: tiktoken.Encoding("nanochat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        )
        try:
            self._encodings.get()
        except ValueError as error:
            raise ConfigError(
                f"it is not a regular expression that tiktoken can use: {error}", key="pattern"
            ) from error
        self._encode_piece: Callable[[str], Tokens] = self._by_tiktoken
        if encoder == "gigatoken":
            from nanochat_bpe.fast import make_encoder

            self._encode_piece = make_encoder(pattern, tokens, self._by_tiktoken)
        if not self.keeps_text():
            raise ConfigError(
                "some characters match no part of it and would be lost; "
                r"end it with alternatives that match any character, such as |\s+|.",
                key="pattern",
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return BPETokenizer, (self._pattern, self._tokens, self._encoder)

    def encode_array(self, text: str) -> Tokens:
        return encode_by_pieces(self._encode_piece, text)

    def _by_tiktoken(self, text: str) -> Tokens:
        return self._encodings.get().encode_to_numpy(text, disallowed_special=()).view(np.int32)

    @property
    def fingerprint(self) -> str:
        content = [self._pattern.encode(), *(name.encode() for name in self._special), *self._tokens]
        digest = hashlib.sha256(self.format.encode())
        for part in content:
            digest.update(len(part).to_bytes(4, "little") + part)
        return digest.hexdigest()

    def files(self) -> Mapping[str, bytes]:
        """The merges in tiktoken's own format: base64 of the bytes, a space, the id."""
        lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(self._tokens)]
        return {MERGES: "".join(lines).encode()}

    def settings(self) -> Mapping[str, Any]:
        return {"pattern": self._pattern, "merges": MERGES}


def _training_text(documents: Iterable[str], config: BPEConfig) -> Iterator[str]:
    left = config.max_chars
    for document in documents:
        text = document[: min(config.doc_cap, left)]
        left -= len(text)
        yield from cut_long_runs(well_formed(text))  # rustbpe does not accept surrogates
        if left <= 0:
            return


def train(documents: Iterable[str], config: BPEConfig) -> BPETokenizer:
    """Train a tokenizer. The same documents give the same merges, for any number of threads.

    Raises:
        ConfigError: when the pattern is not a regular expression or some text does not match it.
        DataError: when the documents are too few for ``vocab_size`` tokens.
    """
    trainer = rustbpe.Tokenizer()
    size = config.vocab_size - len(SPECIAL_TOKENS)  # at least 256: rustbpe panics below that
    _check_pattern(config.pattern)
    trainer.train_from_iterator(_training_text(documents, config), size, pattern=config.pattern)
    tokens = [bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])]
    if len(tokens) < size:
        raise DataError(
            f"{config.vocab_size} tokens are too many: the training documents give only {len(tokens) - BYTES} merges; "
            f"set it to {len(tokens) + len(SPECIAL_TOKENS)} or less, or give more data",
            key="vocab_size",
        )
    tokenizer = BPETokenizer(config.pattern, tokens, config.encoder)
    require_exact(tokenizer, "pattern", r"end it with alternatives that match any character, such as |\s+|.")
    return tokenizer


def _check_pattern(pattern: str) -> None:
    """Check the pattern on an empty text, so that its errors are not taken for errors of the documents."""
    try:
        rustbpe.Tokenizer().train_from_iterator(iter(()), BYTES, pattern=pattern)
    except ValueError as error:
        raise ConfigError(f"it is not a regular expression that rustbpe can use: {error}", key="pattern") from error


def load(directory: Path, encoder: Encoder = "tiktoken") -> BPETokenizer:
    """Load a tokenizer from a directory that ``save`` wrote.

    Raises:
        CheckpointError: when a file is missing or damaged.
    """

    def make(settings: Mapping[str, Any]) -> BPETokenizer:
        lines = read_regular(directory / MERGES, LARGEST_FILE).decode("ascii").splitlines()
        tokens = checked_bytes([base64.b64decode(line.split()[0], validate=True) for line in lines])
        return BPETokenizer(settings["pattern"], tokens, encoder)

    return load_table_tokenizer(BPETokenizer, directory, make)


def build(config: BPEConfig, context: TokenizerContext) -> BPETokenizer:
    """Load the saved tokenizer if there is one; otherwise train one.

    Raises:
        CheckpointError: when the saved tokenizer is damaged, or differs from the config.
        ConfigError: when the pattern is not a regular expression or some text does not match it.
        DataError: when the documents are too few for ``vocab_size`` tokens.
    """
    if context.saved is None:
        return train(context.documents(), config)
    tokenizer = load(context.saved, config.encoder)
    for name, saved in (("vocab_size", tokenizer.vocab_size), ("pattern", tokenizer._pattern)):
        if saved != getattr(config, name):
            raise CheckpointError(
                f"it is {getattr(config, name)!r}, but the tokenizer in {context.saved} has {saved!r}; "
                f"set it to that, or start a new run",
                key=name,
            )
    return tokenizer
