"""The tokenizer ``sentencepiece``: pieces learned from raw text, and bytes for text that they don't cover.

Sentencepiece writes a space as U+2581; here that is exact, because a U+2581 in the text itself is spelled in bytes.
Unpaired surrogates can't be written in UTF-8: each is read as U+FFFD.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from nanochat_core import (
    SPECIAL_TOKENS,
    CheckpointError,
    ConfigError,
    DataError,
    TableTokenizer,
    TokenizerContext,
    Tokens,
    load_table_tokenizer,
    read_regular,
    require_exact,
    special_tokens_from,
    well_formed,
)
from nanochat_sentencepiece.config import LEAST, SentencePieceConfig

MODEL = "sentencepiece.model"
LARGEST_FILE = 2**29  # bytes; the largest published ones have some 2**25
SPACE = "\u2581"


class SentencePieceTokenizer(TableTokenizer):
    """A tokenizer with the pieces of a sentencepiece model, followed by special tokens.

    Args:
        model: a serialized model.

    Raises:
        ConfigError: when it is not a sentencepiece model, changes text, or has no byte pieces.
    """

    format = "nanochat-sentencepiece-1"

    def __init__(self, model: bytes) -> None:
        self._model = model
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ConfigError(f"it is not a sentencepiece model: {error}", key="model_file") from error
        count = self._pieces.vocab_size()
        super().__init__([self._bytes_of(i) for i in range(count)], special_tokens_from(count))
        by_byte = {self._bytes[i]: i for i in range(count) if self._pieces.IsByte(i)}
        if len(by_byte) < 256:
            raise ConfigError("the model has no byte pieces; train it with byte_fallback = true", key="model_file")
        self._space_in_bytes = [by_byte[bytes([b])] for b in SPACE.encode()]
        if not self.keeps_text():
            raise ConfigError(
                "the model changes text; train it with normalization_rule_name = identity, "
                "add_dummy_prefix = false and remove_extra_whitespaces = false",
                key="model_file",
            )

    def _bytes_of(self, token: int) -> bytes:
        if self._pieces.IsUnknown(token) or self._pieces.IsControl(token) or self._pieces.IsUnused(token):
            return b""
        piece: str = self._pieces.id_to_piece(token)
        if self._pieces.IsByte(token):
            return bytes([int(piece[3:5], 16)])  # <0xAB>
        return piece.replace(SPACE, " ").encode()

    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePieceTokenizer, (self._model,)

    def encode_array(self, text: str) -> Tokens:
        ids: list[int] = []
        for index, part in enumerate(well_formed(text).split(SPACE)):
            ids += self._space_in_bytes if index else ()
            ids += self._pieces.encode(part)
        return np.array(ids, dtype=np.int32)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join((self.format, *SPECIAL_TOKENS, "")).encode() + self._model).hexdigest()

    def files(self) -> Mapping[str, bytes]:
        """The model in sentencepiece's own format."""
        return {MODEL: self._model}

    def settings(self) -> Mapping[str, Any]:
        return {"model": MODEL}


def _training_text(documents: Iterable[str], config: SentencePieceConfig) -> Iterator[str]:
    """Paragraphs of the documents; sentencepiece learns from each separately."""
    left = config.max_chars
    for document in documents:
        text = document[: min(config.doc_cap, left)]
        left -= len(text)
        yield from (part for part in re.split(r"(?<=\n)(?=[^\n])", well_formed(text).replace(SPACE, "")) if part)
        if left <= 0:
            return


def train(documents: Iterable[str], config: SentencePieceConfig) -> SentencePieceTokenizer:
    """Train a tokenizer. The same documents give the same pieces.

    Raises:
        DataError: when the documents are too few for ``vocab_size`` tokens.
    """
    assert config.vocab_size is not None
    model = io.BytesIO()
    error: list[BaseException] = []

    def text() -> Iterator[str]:
        try:
            yield from _training_text(documents, config)
        except BaseException as raised:
            error.append(raised)  # sentencepiece hides it
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=text(),
            model_writer=model,
            vocab_size=config.vocab_size - len(SPECIAL_TOKENS),
            model_type=config.model_type,
            character_coverage=config.character_coverage,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            max_sentence_length=4 * config.doc_cap,  # bytes; longer paragraphs are ignored
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,  # unigram pieces depend on the number of threads
            minloglevel=2,
        )
    except RuntimeError as failure:
        if error:
            raise error[0] from None
        raise DataError(
            f"sentencepiece can't learn {config.vocab_size} pieces from the training documents: lower it (to at least "
            f"{LEAST + 1}), or give more data ({failure})",
            key="vocab_size",
        ) from failure
    if error:
        raise error[0]
    return SentencePieceTokenizer(model.getvalue())


def load(directory: Path) -> SentencePieceTokenizer:
    """Load a tokenizer from a directory that ``save`` wrote.

    Raises:
        CheckpointError: when a file is missing or damaged.
    """

    def make(_: Mapping[str, Any]) -> SentencePieceTokenizer:
        return SentencePieceTokenizer(read_regular(directory / MODEL, LARGEST_FILE))

    return load_table_tokenizer(SentencePieceTokenizer, directory, make)


def build(config: SentencePieceConfig, context: TokenizerContext) -> SentencePieceTokenizer:
    """Load the saved tokenizer if there is one; otherwise load ``model_file``, or train.

    Raises:
        CheckpointError: when the saved tokenizer is damaged, or differs from the config.
        ConfigError: when ``model_file`` is not a sentencepiece model, changes text, has no byte pieces, or differs from
            ``vocab_size``.
        DataError: when the documents are too few for ``vocab_size`` tokens.
    """
    if context.saved is not None:
        tokenizer = load(context.saved)
    elif config.model_file is not None:
        try:
            model = read_regular(config.model_file, LARGEST_FILE)
        except OSError as error:
            raise ConfigError(f"{config.model_file} can't be read ({error.strerror})", key="model_file") from error
        tokenizer = SentencePieceTokenizer(model)
        require_exact(tokenizer, "model_file", "use another model")
    else:
        tokenizer = train(context.documents(), config)
    if config.vocab_size not in (None, tokenizer.vocab_size):
        where = context.saved or config.model_file
        message = f"it is {config.vocab_size}, but {where} has {tokenizer.vocab_size} pieces; set it to that"
        if context.saved:
            raise CheckpointError(f"{message}, or start a new run", key="vocab_size")
        raise ConfigError(message, key="vocab_size")
    return tokenizer
