from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_bytes.config import BytesConfig
from nanochat_bytes.tokenizer import ByteTokenizer, build
from nanochat_core import CheckpointError, TokenizerContext
from nanochat_core.testing import check_tokenizer

TOKENIZER = build(BytesConfig(), TokenizerContext(documents=list))


def test_contract() -> None:
    check_tokenizer(build, BytesConfig(), list, other_process=False)


@given(st.text())
def test_round_trip(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert ids == list(text.encode())
    assert TOKENIZER.decode(ids) == text
    (led,) = TOKENIZER.encode_documents([text])
    assert led.dtype == np.int32
    assert led.tolist() == [TOKENIZER.bos_id, *ids]


def test_vocabulary() -> None:
    assert TOKENIZER.vocab_size == 265
    assert sorted(TOKENIZER.special_tokens.values()) == list(range(256, 265))
    assert TOKENIZER.token_bytes().tolist() == [1] * 256 + [0] * 9
    assert TOKENIZER.decode_bytes([0xC3, TOKENIZER.bos_id, 0xA9]) == b"\xc3<|bos|>\xa9"


def test_special_tokens_in_text_are_text() -> None:
    assert max(TOKENIZER.encode("<|bos|>")) < 256


def test_lone_surrogates_become_replacement_characters() -> None:
    assert TOKENIZER.decode(TOKENIZER.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"
    assert TOKENIZER.decode(TOKENIZER.encode("\ud83d\ude42")) == "🙂"


@pytest.mark.parametrize("wrong", [265, -1])
def test_unknown_ids(wrong: int) -> None:
    with pytest.raises(KeyError):
        TOKENIZER.decode_bytes([wrong])


def test_saves_and_loads(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    loaded = build(BytesConfig(), TokenizerContext(documents=list, saved=tmp_path))
    assert isinstance(loaded, ByteTokenizer)
    assert loaded.fingerprint == TOKENIZER.fingerprint
    assert len(TOKENIZER.fingerprint) == len(hashlib.sha256().hexdigest())


@pytest.mark.parametrize("content", ["{}", "nothing", None])
def test_another_tokenizers_directory(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="tokenizer"):
        build(BytesConfig(), TokenizerContext(documents=list, saved=tmp_path))
