"""A base class of tokenizers that know the bytes of each of their tokens, for plugin authors."""

from __future__ import annotations

import json
import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from nanochat_core.data.texts import SPECIAL_TOKENS, cut_long_runs, well_formed
from nanochat_core.errors import CheckpointError, ConfigError
from nanochat_core.files import read_json, shorten
from nanochat_core.interfaces.tokenizer import Tokenizer
from nanochat_core.interfaces.types import Tokens

Thing = TypeVar("Thing")

# Every kind of character that split patterns distinguish or normalisation changes.
PROBE = "It's 12345 wörter, 漢字 -- \t (x_1 != y)\r\n\n  end \u0041\u030a \ufb01\u2460 \x00 🙂  "


def special_tokens_from(first: int, own: Mapping[str, int] | None = None) -> dict[str, int]:
    """Ids of the special tokens, counted from ``first`` on, in addition to the ``own`` ones of an encoding. An encoding
    that has ``<|bos|>`` gets no others."""
    if own is not None and "<|bos|>" in own:
        return dict(own)
    return {**(own or {}), **{name: first + i for i, name in enumerate(SPECIAL_TOKENS)}}


class PerThread(Generic[Thing]):
    """An object of its own for each thread, made when the thread first asks for it.

    For encoders with compiled regular expressions: Rust's ``regex`` keeps its working memory for the thread that
    matches first and lends others some behind a lock, which costs a third more time for a text.
    """

    def __init__(self, make: Callable[[], Thing]) -> None:
        self._make, self._local = make, threading.local()

    def get(self) -> Thing:
        thing: Thing | None = getattr(self._local, "thing", None)
        if thing is None:
            thing = self._local.thing = self._make()
        return thing


class TableTokenizer(Tokenizer):
    """A tokenizer with a table of its tokens' bytes. A subclass provides ``encode_array``,
    ``fingerprint``, ``files``, and ``__reduce__`` where its parts can't be pickled.

    Args:
        tokens: bytes of the ordinary tokens by id; empty for unused ids.
        special: ids of the special tokens.
    """

    format: ClassVar[str]  # name and version of what ``save`` writes
    settings_file: ClassVar[str] = "tokenizer.json"

    def __init__(self, tokens: Sequence[bytes], special: Mapping[str, int]) -> None:
        size = max(len(tokens), *(i + 1 for i in special.values()))
        self._special = dict(special)
        self._bytes = [*tokens, *[b""] * (size - len(tokens))]
        self._spelt = dict(enumerate(self._bytes)) | {i: n.encode() for n, i in special.items()}

    @abstractmethod
    def encode_array(self, text: str) -> Tokens:
        """``encode`` as an array of integers."""

    @abstractmethod
    def files(self) -> Mapping[str, bytes]:
        """Content of what ``save`` writes beside the settings, by file name."""

    def settings(self) -> Mapping[str, Any]:
        """Further content of the settings."""
        return {}

    @property
    def vocab_size(self) -> int:
        return len(self._bytes)

    @property
    def special_tokens(self) -> Mapping[str, int]:
        return self._special

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def encode_documents(self, texts: Sequence[str]) -> list[Tokens]:
        bos = np.array([self.bos_id], dtype=np.int32)
        return [np.concatenate((bos, self.encode_array(text))) for text in texts]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join([self._spelt[i] for i in ids])

    def token_bytes(self) -> Tokens:
        sizes = np.array([len(token) for token in self._bytes], dtype=np.int32)
        sizes[list(self._special.values())] = 0
        return sizes

    def keeps_text(self) -> bool:
        """Whether a difficult text is decoded as it was."""
        return self.decode(self.encode(PROBE)) == PROBE

    def save(self, directory: Path) -> None:
        """Write ``files``, and the settings: format, sizes, special tokens and fingerprint, as JSON."""
        for name, content in self.files().items():
            (directory / name).write_bytes(content)
        settings = {
            "format": self.format,
            "vocab_size": self.vocab_size,
            "special_tokens": self._special,
            **self.settings(),
            "fingerprint": self.fingerprint,
        }
        text = json.dumps(settings, indent=2) + "\n"
        (directory / self.settings_file).write_text(text, encoding="utf-8", newline="\n")


def encode_by_pieces(encode: Callable[[str], Tokens], text: str) -> Tokens:
    """``encode(text)``, for an encoder that matches regular expressions and takes nothing but UTF-8.

    Very long white space is encoded in pieces, see ``cut_long_runs``, and text that UTF-8 can't hold is repaired by
    ``well_formed``.

    Args:
        encode: returns int32 ids, and raises UnicodeEncodeError on a lone surrogate.
    """

    def encode_piece(piece: str) -> Tokens:
        try:
            return encode(piece)
        except UnicodeEncodeError:
            return encode(well_formed(piece))

    pieces = cut_long_runs(text)
    return encode_piece(text) if len(pieces) == 1 else np.concatenate([encode_piece(piece) for piece in pieces])


Made = TypeVar("Made", bound=TableTokenizer)


def load_table_tokenizer(kind: type[Made], directory: Path, make: Callable[[Mapping[str, Any]], Made]) -> Made:
    """The tokenizer that ``save`` wrote to ``directory``.

    Args:
        make: makes it from the settings; it reads the other files, and may raise what reading and parsing raise.

    Raises:
        CheckpointError: when a file is missing or damaged, or they don't belong together.
    """
    try:
        settings = read_json(directory / kind.settings_file)
        if settings["format"] != kind.format:
            raise ValueError(f"its format is {shorten(settings['format'])}, this version reads {kind.format!r}")
        tokenizer = make(settings)
        if tokenizer.fingerprint != settings.get(
            "fingerprint", tokenizer.fingerprint
        ):  # early byte tokenizers had none
            raise ValueError("the files don't belong together: their fingerprint differs")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(
            f"the tokenizer in {directory} can't be read ({error}); restore its files, or start a new run"
        ) from error
    return tokenizer
