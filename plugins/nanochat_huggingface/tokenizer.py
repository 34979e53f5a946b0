"""The tokenizer ``huggingface``: a tokenizer.json, exact to the byte.

Only byte-level tokenizers are supported: those that spell every byte as one printable character (GPT-2's alphabet). The
file's normalization, leading spaces, templates, truncation and padding are removed, so that text is not changed.
Unpaired surrogates can't be written in UTF-8: each is read as U+FFFD.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from nanochat_core import (
    LARGEST_VOCABULARY,
    ConfigError,
    TableTokenizer,
    TokenizerContext,
    Tokens,
    load_table_tokenizer,
    no_panics,
    parse_text,
    read_regular,
    require_exact,
    shorten,
    special_tokens_from,
    well_formed,
)
from nanochat_huggingface.config import HuggingFaceConfig

CONTENT = "tokenizer.json"
LARGEST_FILE = 2**29  # bytes; the largest published ones have some 2**25

# What cuts a text before it is encoded and loses nothing.
CUTS = ("ByteLevel", "Digits", "FixedLength", "Punctuation", "Sequence", "Split", "UnicodeScripts")


def _alphabet() -> dict[str, int]:
    """GPT-2's alphabet: bytes by the character that spells them. Printable bytes spell themselves; the others are
    numbered from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


ALPHABET = _alphabet()


class HuggingFaceTokenizer(TableTokenizer):
    """A byte-level tokenizer of the library tokenizers. It keeps its ids; our special tokens follow unless it has
    ``<|bos|>``.

    Args:
        content: content of a tokenizer.json that does not change text, as ``exact`` returns it.

    Raises:
        ConfigError: when it is not byte-level, or changes text.
    """

    format = "nanochat-huggingface-1"
    settings_file = "nanochat.json"

    def __init__(self, content: str) -> None:
        self._content = content
        try:
            with no_panics():
                self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises nothing more precise
            raise ConfigError(f"tokenizers can't read this tokenizer.json: {error}", key="path") from error
        self._tokenizer.encode_special_tokens = True  # names of special tokens in a text are ordinary text
        added = {t["content"]: t for t in json.loads(content).get("added_tokens", [])}
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if max(vocabulary.values(), default=0) >= LARGEST_VOCABULARY:
            raise ConfigError(f"it has an id of {LARGEST_VOCABULARY} or more", key="path")
        if len(set(vocabulary.values())) < len(vocabulary):
            raise ConfigError("two of its tokens have the same id", key="path")
        self._added = {name for name in added if name in vocabulary}
        own = {name: i for name, i in vocabulary.items() if name in added and added[name]["special"]}
        plain = {name: i for name, i in vocabulary.items() if name not in own}
        tokens = [b""] * (max(plain.values(), default=-1) + 1)  # some ids may be unused
        for name, i in plain.items():
            tokens[i] = name.encode() if name in added else _spell(name)
        super().__init__(tokens, special_tokens_from(max(vocabulary.values(), default=-1) + 1, own))
        if len({token for token in tokens if len(token) == 1}) < 256:
            raise ConfigError("not all 256 bytes are among its tokens; use a byte-level tokenizer", key="path")
        if not self.keeps_text():
            raise ConfigError("this tokenizer changes text irreversibly; use another", key="path")

    def markers(self) -> set[str]:
        return self._added

    def __reduce__(self) -> tuple[Any, ...]:
        return HuggingFaceTokenizer, (self._content,)

    def encode_array(self, text: str) -> Tokens:
        return np.array(self._tokenizer.encode(well_formed(text), add_special_tokens=False).ids, dtype=np.int32)

    def encode_documents(self, texts: Sequence[str]) -> list[Tokens]:
        encoded = self._tokenizer.encode_batch_fast([well_formed(text) for text in texts], add_special_tokens=False)
        return [np.array([self.bos_id, *encoding.ids], dtype=np.int32) for encoding in encoded]

    @property
    def fingerprint(self) -> str:
        special = json.dumps(sorted(self._special.items()))
        return hashlib.sha256("\n".join((self.format, special, self._content)).encode()).hexdigest()

    def files(self) -> Mapping[str, bytes]:
        """The tokenizer.json, by name."""
        return {CONTENT: self._content.encode()}


def _spell(name: str) -> bytes:
    try:
        return bytes(ALPHABET[character] for character in name)
    except KeyError:
        raise ConfigError(
            f"token {name!r} is not spelled in bytes; only byte-level tokenizers are exact (GPT-2, "
            f'Llama 3, Qwen, ...). For the .model file of a sentencepiece tokenizer use plugin = "sentencepiece"',
            key="path",
        ) from None


def _steps(step: Any) -> Iterator[dict[str, Any]]:
    """The steps of a pre_tokenizer, of sequences in sequences too."""
    if step is not None:
        yield step
        for inner in step.get("pretokenizers", []):
            yield from _steps(inner)


def exact(content: str) -> str:
    """Remove everything from a tokenizer.json that changes text or adds tokens.

    Raises:
        ConfigError: when it is not a tokenizer.json.
    """
    try:
        parsed = json.loads(content)
        kind = parsed["model"]["type"]
        steps = list(_steps(parsed.get("pre_tokenizer")))
        added = [(token["content"], token["special"], token) for token in parsed.get("added_tokens") or []]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"it is not a tokenizer.json ({shorten(error, 200)})", key="path") from error
    parsed |= dict.fromkeys(("normalizer", "post_processor", "truncation", "padding"))
    for step in steps:
        if step.get("type") not in CUTS or step.get("behavior") == "Removed":
            raise ConfigError(
                f"this tokenizer changes text: its pre_tokenizer has the step {shorten(step.get('type'))}, which drops "
                f"or replaces characters; use another",
                key="path",
            )
        if step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
    for _, _, token in added:
        token |= {"lstrip": False, "rstrip": False}  # they swallow the blanks beside it
    if kind == "BPE" and parsed["model"].get("dropout"):
        parsed["model"]["dropout"] = None
    return json.dumps(parsed, ensure_ascii=False)


def load(directory: Path) -> HuggingFaceTokenizer:
    """Load a tokenizer from a directory that ``save`` wrote.

    Raises:
        CheckpointError: when a file is missing or damaged.
    """

    def make(_: Mapping[str, Any]) -> HuggingFaceTokenizer:
        return HuggingFaceTokenizer(read_regular(directory / CONTENT, LARGEST_FILE).decode())

    return load_table_tokenizer(HuggingFaceTokenizer, directory, make)


def build(config: HuggingFaceConfig, context: TokenizerContext) -> HuggingFaceTokenizer:
    """Load the saved tokenizer if there is one; otherwise that of ``path``.

    Raises:
        CheckpointError: when the saved tokenizer is damaged.
        ConfigError: when the file is not a tokenizer.json, is not byte-level, or changes text.
    """
    if context.saved is not None:
        return load(context.saved)
    try:
        content = parse_text(read_regular(config.path, LARGEST_FILE))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{config.path} can't be read ({error})", key="path") from error
    try:
        tokenizer = HuggingFaceTokenizer(exact(content))
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"it is not a tokenizer.json ({shorten(error, 200)})", key="path") from error
    require_exact(tokenizer, "path", "use another")
    return tokenizer
