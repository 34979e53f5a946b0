"""The tokenizer ``huggingface``: what a tokenizer.json says, exactly to the byte.

Byte-level tokenizers only: those that spell every byte as one printable character (GPT-2's alphabet). What the file
says of normalisation, leading spaces, templates, truncation and padding is dropped, so that text stays what it is.
Two lone halves of a surrogate pair can't be written in UTF-8: text is read as if they were U+FFFD.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from nanochat_core import CheckpointError, ConfigError, Tokenizer, TokenizerContext, Tokens
from nanochat_huggingface.config import SPECIAL_TOKENS, HuggingFaceConfig

FORMAT = "nanochat-huggingface-1"
SETTINGS, CONTENT = "nanochat.json", "tokenizer.json"
_PROBE = "It's 12345 wörter, 漢字 -- \t (x_1 != y)\r\n\n  end \u0041\u030a \x00 🙂  "


def _alphabet() -> dict[str, int]:
    """GPT-2's alphabet: the character that stands for each byte. Printable bytes stand for themselves, the others
    are counted from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


ALPHABET = _alphabet()


class HuggingFaceTokenizer(Tokenizer):
    """A byte-level tokenizer of the library tokenizers. Its ids stay what they are; special tokens of ours follow
    unless it has ``<|bos|>``.

    Args:
        content: of a tokenizer.json; see ``exact``.

    Raises:
        ConfigError: when it isn't byte-level, or changes text.
    """

    def __init__(self, content: str) -> None:
        self._content = content
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises nothing more precise
            raise ConfigError(f"tokenizer.path: no tokenizer.json that tokenizers can read: {error}") from error
        self._tokenizer.encode_special_tokens = True  # their names in a text are text
        added = {t["content"]: t for t in json.loads(content).get("added_tokens", [])}
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self._special = {name: i for name, i in vocabulary.items() if name in added and added[name]["special"]}
        plain = {name: i for name, i in vocabulary.items() if name not in self._special}
        if "<|bos|>" not in self._special:
            first = max(vocabulary.values()) + 1
            self._special |= {name: first + i for i, name in enumerate(SPECIAL_TOKENS)}
        self._bytes = [b""] * (max(*plain.values(), *self._special.values()) + 1)  # some ids may mean nothing
        for name, i in plain.items():
            self._bytes[i] = name.encode() if name in added else _spell(name)
        self._names = {i: name.encode() for name, i in self._special.items()}
        if len({token for token in self._bytes if len(token) == 1}) < 256:
            raise ConfigError("tokenizer.path: not all 256 bytes are among its tokens; is it byte-level?")
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise ConfigError("tokenizer.path: this tokenizer changes text, which can't be undone; use another")

    def __reduce__(self) -> tuple[Any, ...]:
        return HuggingFaceTokenizer, (self._content,)

    @property
    def vocab_size(self) -> int:
        return len(self._bytes)

    @property
    def special_tokens(self) -> Mapping[str, int]:
        return self._special

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(_mend(text), add_special_tokens=False).ids
        return ids

    def encode_documents(self, texts: Sequence[str]) -> list[Tokens]:
        encoded = self._tokenizer.encode_batch_fast([_mend(text) for text in texts], add_special_tokens=False)
        return [np.array([self.bos_id, *encoding.ids], dtype=np.int32) for encoding in encoded]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join([self._names.get(i, self._bytes[i]) for i in ids])

    def token_bytes(self) -> Tokens:
        return np.array([len(token) for token in self._bytes], dtype=np.int32)

    @property
    def fingerprint(self) -> str:
        special = json.dumps(sorted(self._special.items()))
        return hashlib.sha256("\n".join((FORMAT, special, self._content)).encode()).hexdigest()

    def save(self, directory: Path) -> None:
        """Write ``tokenizer.json`` as it is used, and ``nanochat.json`` (about it)."""
        (directory / CONTENT).write_text(self._content, encoding="utf-8", newline="\n")
        settings = {
            "format": FORMAT,
            "vocab_size": self.vocab_size,
            "special_tokens": self._special,
            "fingerprint": self.fingerprint,
        }
        (directory / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8", newline="\n")


def _spell(name: str) -> bytes:
    try:
        return bytes(ALPHABET[character] for character in name)
    except KeyError:
        raise ConfigError(
            f"tokenizer.path: token {name!r} isn't spelt in bytes; only byte-level tokenizers are exact (GPT-2, "
            f'Llama 3, Qwen, ...). For the .model file of a sentencepiece tokenizer use plugin = "sentencepiece"'
        ) from None


def _mend(text: str) -> str:
    """Surrogate pairs joined, lone ones replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def exact(content: str) -> str:
    """A tokenizer.json without what changes text or adds to it.

    Raises:
        ConfigError: when it is no tokenizer.json.
    """
    try:
        parsed = json.loads(content)
        parsed["model"]["type"]
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"tokenizer.path: no tokenizer.json ({error!r})") from error
    parsed |= dict.fromkeys(("normalizer", "post_processor", "truncation", "padding"))
    before = parsed.get("pre_tokenizer") or {}
    for step in (before, *before.get("pretokenizers", [])):
        if step.get("type") == "ByteLevel":
            step["add_prefix_space"] = False
    if parsed["model"].get("dropout"):
        parsed["model"]["dropout"] = None
    return json.dumps(parsed, ensure_ascii=False)


def load(directory: Path) -> HuggingFaceTokenizer:
    """Read what ``save`` wrote.

    Raises:
        CheckpointError: when a file is missing or damaged.
    """
    try:
        settings = json.loads((directory / SETTINGS).read_text(encoding="utf-8"))
        if settings["format"] != FORMAT:
            raise ValueError(f"its format is {settings['format']!r}, this version reads {FORMAT!r}")
        tokenizer = HuggingFaceTokenizer((directory / CONTENT).read_text(encoding="utf-8"))
        if tokenizer.fingerprint != settings["fingerprint"]:
            raise ValueError("the files don't belong together: their fingerprint is another")
    except (OSError, ValueError, LookupError, TypeError, ConfigError) as error:
        raise CheckpointError(
            f"the tokenizer in {directory} can't be read ({error}); restore {SETTINGS} and {CONTENT} there, "
            f"or start a new run"
        ) from error
    return tokenizer


def build(config: HuggingFaceConfig, context: TokenizerContext) -> HuggingFaceTokenizer:
    """The saved tokenizer if there is one, else that of ``path``.

    Raises:
        CheckpointError: when the saved one is damaged.
        ConfigError: see ``HuggingFaceTokenizer``.
    """
    if context.saved is not None:
        return load(context.saved)
    return HuggingFaceTokenizer(exact(config.path.read_text(encoding="utf-8")))
