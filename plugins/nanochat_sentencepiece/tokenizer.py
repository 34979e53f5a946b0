"""The tokenizer ``sentencepiece``: pieces learnt from raw text, bytes for what they don't cover.

Sentencepiece writes a space as U+2581; here that is exact, because a U+2581 in the text itself is spelt in bytes. Two
lone halves of a surrogate pair can't be written in UTF-8: text is read as if they were U+FFFD.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from nanochat_core import CheckpointError, ConfigError, DataError, Tokenizer, TokenizerContext, Tokens
from nanochat_sentencepiece.config import LEAST, SPECIAL_TOKENS, SentencePieceConfig

FORMAT = "nanochat-sentencepiece-1"
SETTINGS, MODEL = "tokenizer.json", "sentencepiece.model"
SPACE = "\u2581"
_PROBE = "It's 12345 wörter, 漢字 -- \t (x_1 != y)\r\n\n  end \ufb01\u2460 \x00 🙂  "


class SentencePieceTokenizer(Tokenizer):
    """The pieces of a model, then special tokens.

    Args:
        model: a serialized model.

    Raises:
        ConfigError: when the model changes text, or has no bytes for what its pieces don't cover.
    """

    def __init__(self, model: bytes) -> None:
        self._model = model
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ConfigError(f"tokenizer.model_file: no model of sentencepiece: {error}") from error
        count = self._pieces.vocab_size()
        self._bytes = [self._bytes_of(i) for i in range(count)]
        self._special = {name: count + i for i, name in enumerate(SPECIAL_TOKENS)}
        self._names = [name.encode() for name in SPECIAL_TOKENS]
        by_byte = {self._bytes[i]: i for i in range(count) if self._pieces.IsByte(i)}
        if len(by_byte) < 256:
            raise ConfigError("tokenizer.model_file: the model has no bytes; train it with byte_fallback = true")
        self._space_in_bytes = [by_byte[bytes([b])] for b in SPACE.encode()]
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise ConfigError(
                "tokenizer.model_file: the model changes text; train it with normalization_rule_name = identity, "
                "add_dummy_prefix = false and remove_extra_whitespaces = false"
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

    @property
    def vocab_size(self) -> int:
        return len(self._bytes) + len(self._special)

    @property
    def special_tokens(self) -> Mapping[str, int]:
        return self._special

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(_mend(text).split(SPACE)):
            ids += self._space_in_bytes if index else ()
            ids += self._pieces.encode(part)
        return ids

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        known = [*self._bytes, *self._names]
        return b"".join([known[i] for i in ids])

    def token_bytes(self) -> Tokens:
        return np.array([*map(len, self._bytes), *[0] * len(self._special)], dtype=np.int32)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join((FORMAT, *SPECIAL_TOKENS, "")).encode() + self._model).hexdigest()

    def save(self, directory: Path) -> None:
        """Write ``sentencepiece.model`` (sentencepiece's own format) and ``tokenizer.json`` (about it)."""
        (directory / MODEL).write_bytes(self._model)
        settings = {
            "format": FORMAT,
            "vocab_size": self.vocab_size,
            "special_tokens": self._special,
            "model": MODEL,
            "fingerprint": self.fingerprint,
        }
        (directory / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8", newline="\n")


def _mend(text: str) -> str:
    """Surrogate pairs joined, lone ones replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _training_text(documents: Iterable[str], config: SentencePieceConfig) -> Iterator[str]:
    """Paragraphs: sentencepiece learns from each by itself."""
    left = config.max_chars
    for document in documents:
        text = document[: min(config.doc_cap, left)]
        left -= len(text)
        yield from (part for part in re.split(r"(?<=\n)(?=[^\n])", _mend(text).replace(SPACE, "")) if part)
        if left <= 0:
            return


def train(documents: Iterable[str], config: SentencePieceConfig) -> SentencePieceTokenizer:
    """Learn pieces. The same documents give the same tokenizer.

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
            error.append(raised)  # sentencepiece would hide it
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
            max_sentence_length=4 * config.doc_cap,  # bytes; longer ones would be left out
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,  # unigram pieces depend on it
            minloglevel=2,
        )
    except RuntimeError as failure:
        if error:
            raise error[0] from None
        raise DataError(
            f"tokenizer.vocab_size = {config.vocab_size} (at least {LEAST + 1}): sentencepiece can't learn so many "
            f"pieces from the training documents: lower it, or give more data ({failure})"
        ) from failure
    if error:
        raise error[0]
    return SentencePieceTokenizer(model.getvalue())


def load(directory: Path) -> SentencePieceTokenizer:
    """Read what ``save`` wrote.

    Raises:
        CheckpointError: when a file is missing or damaged.
    """
    try:
        settings = json.loads((directory / SETTINGS).read_text(encoding="utf-8"))
        if settings["format"] != FORMAT:
            raise ValueError(f"its format is {settings['format']!r}, this version reads {FORMAT!r}")
        tokenizer = SentencePieceTokenizer((directory / MODEL).read_bytes())
        if tokenizer.fingerprint != settings["fingerprint"]:
            raise ValueError("the files don't belong together: their fingerprint is another")
    except (OSError, ValueError, LookupError, TypeError, ConfigError) as error:
        raise CheckpointError(
            f"the tokenizer in {directory} can't be read ({error}); restore {SETTINGS} and {MODEL} there, "
            f"or start a new run"
        ) from error
    return tokenizer


def build(config: SentencePieceConfig, context: TokenizerContext) -> SentencePieceTokenizer:
    """The saved tokenizer if there is one, else that of ``model_file``, else a freshly trained one.

    Raises:
        CheckpointError: when the saved one is damaged, or isn't what the config asks for.
        ConfigError, DataError: see ``SentencePieceTokenizer`` and ``train``.
    """
    if context.saved is not None:
        tokenizer = load(context.saved)
    elif config.model_file is not None:
        tokenizer = SentencePieceTokenizer(config.model_file.read_bytes())
    else:
        tokenizer = train(context.documents(), config)
    if config.vocab_size not in (None, tokenizer.vocab_size):
        where = context.saved or config.model_file
        message = f"tokenizer.vocab_size = {config.vocab_size}, but {where} has {tokenizer.vocab_size}; set it to that"
        raise CheckpointError(f"{message}, or start a new run") if context.saved else ConfigError(message)
    return tokenizer
