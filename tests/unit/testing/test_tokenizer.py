"""The contract check notices each way of breaking the contract."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers.fakes import FakeConfig, FakeTokenizer

from nanochat_core import TokenizerContext, Tokens
from nanochat_core.testing import check_tokenizer


class Strips(FakeTokenizer):
    def encode(self, text: str) -> list[int]:
        return super().encode(text.strip())


class Parses(FakeTokenizer):
    def encode(self, text: str) -> list[int]:
        parts = text.split("<|user_start|>")
        ids = super().encode(parts[0])
        for part in parts[1:]:
            ids += [self.special_tokens["<|user_start|>"], *super().encode(part)]
        return ids


class Miscounts(FakeTokenizer):
    def token_bytes(self) -> Tokens:
        counts = super().token_bytes()
        counts[65] = 2
        return counts


class CountsSpecial(FakeTokenizer):
    def token_bytes(self) -> Tokens:
        return np.ones(self.vocab_size, dtype=np.int32)


class Forgets(FakeTokenizer):
    """Saved and loaded it is another one."""

    shift = 0

    def __init__(self, shift: int = 3) -> None:
        super().__init__()
        self.shift = shift

    def encode(self, text: str) -> list[int]:
        return [(i + self.shift) % 256 for i in super().encode(text)]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return super().decode_bytes([(i - self.shift) % 256 if i < 256 else i for i in ids])


class NewFingerprints(FakeTokenizer):
    @property
    def fingerprint(self) -> str:
        return hex(id(self))


class HashFingerprints(FakeTokenizer):
    @property
    def fingerprint(self) -> str:
        return hex(hash("bytes"))


class NoBos(FakeTokenizer):
    @property
    def special_tokens(self) -> Mapping[str, int]:
        return {name: i for name, i in super().special_tokens.items() if name != "<|bos|>"}

    @property
    def bos_id(self) -> int:
        return 256


class LosesBos(FakeTokenizer):
    def encode_documents(self, texts: Sequence[str]) -> list[Tokens]:
        return [np.array(self.encode(text), dtype=np.int32) for text in texts]


class NotPicklable(FakeTokenizer):
    def __init__(self) -> None:
        super().__init__()
        self.function = lambda: None


class LeadsEmptyText(FakeTokenizer):
    def encode(self, text: str) -> list[int]:
        return super().encode(text) or [32]


class TextsOnly(FakeTokenizer):
    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return super().decode_bytes(ids).decode(errors="replace").encode()


class DiesOfSurrogates(FakeTokenizer):
    def encode(self, text: str) -> list[int]:
        text.encode()
        return super().encode(text)


def factory(kind: type[FakeTokenizer]) -> Callable[[FakeConfig, TokenizerContext], FakeTokenizer]:
    def build(config: FakeConfig, context: TokenizerContext) -> FakeTokenizer:
        if kind is Forgets:
            return Forgets(0 if context.saved else 3)
        return kind()

    return build


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Strips, "is decoded as"),
        (Parses, "<|user_start|> in a text becomes the special token"),
        (Miscounts, "token 65 is b'A', but token_bytes() gives 2"),
        (CountsSpecial, "token_bytes() must be 0 for the special token <|bos|>"),
        (Forgets, "saved and loaded, it gives different tokens"),
        (NewFingerprints, "built again, it has a different fingerprint"),
        (NoBos, "special_tokens has no <|bos|>"),
        (LosesBos, "differs from bos and encode"),
        (NotPicklable, "pickled: "),
        (LeadsEmptyText, "the empty text has tokens"),
        (TextsOnly, "decode_bytes does not concatenate"),
        (DiesOfSurrogates, "UnicodeEncodeError"),
    ],
)
def test_broken_tokenizers_fail(kind: type[FakeTokenizer], message: str) -> None:
    with pytest.raises(AssertionError) as caught:
        check_tokenizer(factory(kind), FakeConfig(), list, other_process=False)
    assert message in str(caught.value)
    assert "<lambda>:" not in str(caught.value)  # each rule has a name


def test_a_fingerprint_that_another_process_does_not_share() -> None:
    with pytest.raises(AssertionError, match="in another process, it has a different fingerprint"):
        check_tokenizer(factory(HashFingerprints), FakeConfig(), list)


def test_a_sound_one_passes(tmp_path: Path) -> None:
    tokenizer = check_tokenizer(factory(FakeTokenizer), FakeConfig(), list, other_process=False)
    tokenizer.save(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["vocab_size"] == 265
