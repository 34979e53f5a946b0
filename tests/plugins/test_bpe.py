from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import load_tiktoken_bpe

from nanochat_bpe.config import PATTERN, BPEConfig
from nanochat_bpe.tokenizer import BPETokenizer, build
from nanochat_core import SPECIAL_TOKENS, CheckpointError, ConfigError, DataError, TokenizerContext
from nanochat_core.testing import check_tokenizer

ROOT = Path(__file__).parents[2]
CONFIG = BPEConfig(vocab_size=600)


def make_documents() -> list[str]:
    rng = random.Random(3)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randrange(1, 9))) for _ in range(400)]
    return [" ".join(rng.choices(words, k=120)) + ". Größe 2024\n\n" for _ in range(60)]


def train(config: BPEConfig = CONFIG, documents: list[str] | None = None) -> BPETokenizer:
    return build(config, TokenizerContext(documents=lambda: documents or make_documents()))


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return train()


def test_contract() -> None:
    check_tokenizer(build, BPEConfig(vocab_size=500))


def test_delivers_exactly_the_vocabulary(tokenizer: BPETokenizer) -> None:
    assert tokenizer.vocab_size == 600
    assert list(tokenizer.special_tokens) == list(SPECIAL_TOKENS)
    assert list(tokenizer.special_tokens.values()) == list(range(591, 600))
    assert tokenizer.bos_id == 591
    assert train(BPEConfig(vocab_size=265)).vocab_size == 265


def test_learns_merges(tokenizer: BPETokenizer) -> None:
    text = make_documents()[0]
    assert len(tokenizer.encode(text)) < len(text) / 2


def test_round_trip(tokenizer: BPETokenizer) -> None:
    @settings(max_examples=200)
    @given(st.text())
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
        assert all(0 <= i < tokenizer.bos_id for i in ids)
        (led,) = tokenizer.encode_documents([text])
        assert led.dtype == np.int32
        assert led.tolist() == [tokenizer.bos_id, *ids]

    check()


def test_token_bytes_are_those_of_each_token(tokenizer: BPETokenizer) -> None:
    counts = tokenizer.token_bytes()
    assert counts.dtype == np.int32
    assert counts.tolist() == [len(tokenizer.decode_bytes([i])) if i < tokenizer.bos_id else 0 for i in range(600)]
    assert tokenizer.decode_bytes([tokenizer.bos_id]) == b"<|bos|>"


def test_special_tokens_in_text_are_text(tokenizer: BPETokenizer) -> None:
    for name in SPECIAL_TOKENS:
        assert max(tokenizer.encode(name)) < tokenizer.bos_id
        assert tokenizer.decode(tokenizer.encode(name)) == name


def test_numbers_split_into_groups_of_two(tokenizer: BPETokenizer) -> None:
    assert all(len(tokenizer.decode_bytes([i])) <= 2 for i in tokenizer.encode("20242024202420"))


def test_lone_surrogates_become_replacement_characters() -> None:
    tokenizer = train(documents=[*make_documents(), "a\ud800b " * 50])
    assert tokenizer.decode(tokenizer.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude42")) == "🙂"


@pytest.mark.parametrize("character", [" ", "\n", "\u3000", "a", "!", "7"])
def test_huge_documents(tokenizer: BPETokenizer, character: str) -> None:
    text = "x" + character * 1_000_000 + "x"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_same_documents_give_the_same_tokenizer(tokenizer: BPETokenizer) -> None:
    code = "from tests.plugins.test_bpe import train; print(train().fingerprint)"
    environment = {**os.environ, "RAYON_NUM_THREADS": "5", "PYTHONHASHSEED": "5"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == tokenizer.fingerprint == train().fingerprint, done.stderr


def test_fingerprint_tells_tokenizers_apart(tokenizer: BPETokenizer) -> None:
    others = [
        train(BPEConfig(vocab_size=599)),
        train(BPEConfig(vocab_size=600, pattern=PATTERN.replace("{1,2}", "{1,3}"))),
        train(documents=make_documents()[:30]),
    ]
    assert len({t.fingerprint for t in [tokenizer, *others]}) == 4


def test_saves_and_loads(tokenizer: BPETokenizer, tmp_path: Path) -> None:
    def never() -> list[str]:
        raise AssertionError("trained again")

    tokenizer.save(tmp_path)
    loaded = build(CONFIG, TokenizerContext(documents=never, saved=tmp_path))
    assert loaded.fingerprint == tokenizer.fingerprint
    text = make_documents()[5] + " 🙂"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.special_tokens == tokenizer.special_tokens


def test_tiktoken_itself_reads_the_merges(
    tokenizer: BPETokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # it would keep a copy of the file, and read that next time
    tokenizer.save(tmp_path)
    ranks = load_tiktoken_bpe(str(tmp_path / "merges.tiktoken"))
    assert ranks == {tokenizer.decode_bytes([i]): i for i in range(591)}


def test_damaged_files(tokenizer: BPETokenizer, tmp_path: Path) -> None:
    def load() -> None:
        build(CONFIG, TokenizerContext(documents=list, saved=tmp_path))

    with pytest.raises(CheckpointError, match=r"can't be read.*tokenizer\.json"):
        load()
    tokenizer.save(tmp_path)
    merges = tmp_path / "merges.tiktoken"
    lines = merges.read_text().splitlines(keepends=True)
    for damaged in (
        lines[:-1],
        lines[:300],
        [*lines[:-1], "?\n"],
        [*lines[:300], lines[301], lines[300], *lines[302:]],
    ):
        merges.write_text("".join(damaged))
        with pytest.raises(CheckpointError, match="start a new run"):
            load()
    merges.write_text("".join(lines))
    settings_file = tmp_path / "tokenizer.json"
    content = json.loads(settings_file.read_text())
    for wrong in ({**content, "format": "nanochat-bpe-9"}, {**content, "pattern": r"\s+|."}, {}, []):
        settings_file.write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match="start a new run"):
            load()


def test_saved_tokenizer_that_the_config_does_not_ask_for(tokenizer: BPETokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"^vocab_size: it is 700, .*has 600"):
        build(BPEConfig(vocab_size=700), TokenizerContext(documents=list, saved=tmp_path))


def test_too_few_documents() -> None:
    documents = ["some words, some more words"]
    with pytest.raises(DataError, match=r"^vocab_size: 600 tokens are too many: .* set it to (\d+) or less") as caught:
        train(documents=documents)
    most = int(str(caught.value).split("set it to ")[1].split()[0])
    assert train(BPEConfig(vocab_size=most), documents).vocab_size == most
    with pytest.raises(DataError):
        train(BPEConfig(vocab_size=most + 1), documents)


def test_limits_on_what_is_learnt_from() -> None:
    repeated = "zyx" * 500
    documents = [make_documents()[0] + repeated]
    cap = len(documents[0]) - len(repeated)
    learnt = train(BPEConfig(vocab_size=300), documents).encode("zyxzyx")
    assert len(learnt) < 6
    assert len(train(BPEConfig(vocab_size=300, doc_cap=cap), documents).encode("zyxzyx")) == 6
    assert len(train(BPEConfig(vocab_size=300, max_chars=cap), documents).encode("zyxzyx")) == 6


def test_errors_of_the_documents_pass_through() -> None:
    def documents():  # type: ignore[no-untyped-def]
        yield "one"
        raise DataError("shard_00003.parquet is damaged")

    with pytest.raises(DataError, match="shard_00003"):
        build(CONFIG, TokenizerContext(documents=documents))


@pytest.mark.parametrize("pattern", ["(", r"\p{L}+", "[a-z]+| "])
def test_unusable_patterns(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"^pattern: "):
        train(BPEConfig(vocab_size=300, pattern=pattern))


@pytest.mark.parametrize("wrong", [{"vocab_size": 264}, {"max_chars": 0}, {"doc_cap": 0}])
def test_config(wrong) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="at least"):
        BPEConfig(**wrong)
    assert BPEConfig().vocab_size == 32768


# ------------------------------------------------------------------------------------------------------ gigatoken

AWKWARD = " \n\r\t'sdmtlvre12²٣Ⅷaé漢!.-\u00a0\u3000\u2028\u0301<|>🙂\u088f\ud800"


@pytest.mark.parametrize("digits", [2, 3])
def test_gigatoken_gives_the_same_tokens(tokenizer: BPETokenizer, digits: int) -> None:
    pytest.importorskip("gigatoken")
    pattern = PATTERN.replace("{1,2}", f"{{1,{digits}}}")
    slow = BPETokenizer(pattern, tokenizer._tokens)
    fast = BPETokenizer(pattern, tokenizer._tokens, "gigatoken")
    assert fast.fingerprint == slow.fingerprint

    @settings(max_examples=300)
    @given(st.text() | st.text(alphabet=AWKWARD))
    def check(text: str) -> None:
        assert fast.encode(text) == slow.encode(text)

    check()
    for text in make_documents():
        assert fast.encode(text) == slow.encode(text)
    text = " " * 1_000_000 + "x1234567"
    assert fast.encode(text) == slow.encode(text)


def test_contract_with_gigatoken() -> None:
    pytest.importorskip("gigatoken")
    check_tokenizer(build, BPEConfig(vocab_size=500, encoder="gigatoken"), other_process=False)


def test_gigatoken_that_is_missing_or_does_not_know_the_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^encoder: gigatoken does not support tokenizer.pattern"):
        train(BPEConfig(vocab_size=300, pattern=r"\s+|\S+", encoder="gigatoken"))
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    with pytest.raises(ConfigError, match=r"^encoder: .*pip install gigatoken"):
        train(BPEConfig(vocab_size=300, encoder="gigatoken"))


@pytest.mark.parametrize("damage", ["fewer bytes", "twice", "vocab_size", "special_tokens", "nested"])
def test_saved_files_that_don_t_belong_together(tmp_path: Path, damage: str) -> None:
    """Without a fingerprint too: a hostile file must not reach the library, which would panic."""
    train().save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    lines = (tmp_path / "merges.tiktoken").read_text().splitlines(keepends=True)
    del settings["fingerprint"]
    if damage == "fewer bytes":
        lines = lines[100:]
    elif damage == "twice":
        lines[300] = lines[301]
    elif damage == "vocab_size":
        settings["vocab_size"] += 1
    elif damage == "special_tokens":
        settings["special_tokens"]["<|bos|>"] = -1
    (tmp_path / "merges.tiktoken").write_text("".join(lines))
    (tmp_path / "tokenizer.json").write_text("[" * 100_000 if damage == "nested" else json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"can't be read .*start a new run"):
        build(CONFIG, TokenizerContext(documents=list, saved=tmp_path))
