"""A base class of tokenizers that know the bytes of each of their tokens, for plugin authors."""

from __future__ import annotations

import contextlib
import json
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
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


LARGEST_VOCABULARY = 2**24  # ids; the largest published ones are below 2**19

# A character of every category of Unicode, some of each of those that differ in how they are written.
CATEGORIES = (
    "Aa\u00c0\u01c5\u02b0\u05d0\u6f22\u0301\u0903\u20dd0\u0663\u2167\u00b2\u00bc_\u203f-\u2014"
    "([{)]}\u00ab\u00bb!\u00a7+\u00ac$\u20ac^\u02d8"
    "|\u00a6\u00b0 \u00a0\u1680\u2003\u3000\u2028\u2029\x00\x85"
    "\u00ad\u200b\u200d\ufeff\ue000\u0378\ufffe\ufffd\u2581\u0120\U0001f642\U000e0041\U00020000\U0010ffff"
)
TEXTS = (
    PROBE,
    "".join(map(chr, range(128))),
    CATEGORIES,
    " ".join(CATEGORIES),
    *(chr(i) for i in range(128)),
    *CATEGORIES,
    "a" * 1000,
    " " * 50 + "\n" * 50 + "\t\r\n" * 20,
)


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

    def text_problem(self) -> str:
        """Describe a text that is not decoded as it was, or whose tokens have other sizes; empty if none is found.

        Tried are every ASCII character, characters of every category of Unicode, and every token that looks like a
        marker (``<mask>``) between blanks.
        """
        markers = {
            token.decode("utf-8", "replace") for token in self._bytes if token[:1] in (b"<", b"[") and len(token) > 2
        }
        markers |= self.markers() | set(self._special)
        sizes = self.token_bytes()
        for text in (*TEXTS, *(f"a {name} b{name}c  {name}\n{name}" for name in sorted(markers))):
            ids, data = self.encode(text), text.encode()
            back = self.decode_bytes(ids)
            if back != data:
                return f"{shorten(text)} comes back as {shorten(back.decode('utf-8', 'replace'))}"
            if int(sizes[ids].sum()) != len(data):
                return f"the tokens of {shorten(text)} have {int(sizes[ids].sum())} bytes instead of {len(data)}"
        return ""

    def markers(self) -> set[str]:
        """Names that the encoder finds in a text before anything else."""
        return set()

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


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST_VOCABULARY


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


@contextlib.contextmanager
def no_panics() -> Iterator[None]:
    """Raise a ValueError where a library written in Rust panics, which no handler of exceptions would catch."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the library gives up: {shorten(str(error), 200)}") from error


def require_exact(tokenizer: TableTokenizer, key: str, remedy: str) -> None:
    """Check that a tokenizer keeps every text, before anything is trained with it.

    Args:
        key: option that chose it.

    Raises:
        ConfigError: with a text that it changes.
    """
    try:
        with no_panics():
            problem = tokenizer.text_problem()
    except (ValueError, RuntimeError) as error:
        problem = str(error)
    if problem:
        raise ConfigError(f"this tokenizer changes text: {problem}; {remedy}", key=key)


def checked_bytes(tokens: Sequence[bytes]) -> Sequence[bytes]:
    """``tokens``, of which the first 256 must be the single bytes.

    Raises:
        ValueError: when they are not, or a token is empty or repeated.
    """
    if sorted(tokens[:256]) != [bytes([b]) for b in range(256)]:
        raise ValueError("the first 256 tokens are not the 256 bytes")
    if len(set(tokens)) < len(tokens) or b"" in tokens:
        raise ValueError("a token is empty or repeated")
    return tokens


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
        special = settings.get("special_tokens", {})
        if not isinstance(special, dict) or not all(_is_id(i) for i in special.values()):
            raise ValueError("its special tokens are not names and ids")
        with no_panics():
            tokenizer = make(settings)
        for name, value in (("fingerprint", tokenizer.fingerprint), ("vocab_size", tokenizer.vocab_size),
                            ("special_tokens", dict(tokenizer.special_tokens))):  # fmt: skip
            if settings.get(name, value) != value:  # early byte tokenizers had no fingerprint
                raise ValueError(f"the files don't belong together: their {name} differs")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, ConfigError) as error:
        raise CheckpointError(
            f"the tokenizer in {directory} can't be read ({error}); restore its files, or start a new run"
        ) from error
    return tokenizer
