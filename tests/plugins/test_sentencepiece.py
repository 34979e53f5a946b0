from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanochat_core import SPECIAL_TOKENS, CheckpointError, ConfigError, DataError, TokenizerContext
from nanochat_core.testing import check_tokenizer, sample_documents
from nanochat_sentencepiece.config import SentencePieceConfig
from nanochat_sentencepiece.tokenizer import SentencePieceTokenizer, build

sentencepiece = pytest.importorskip("sentencepiece")
CONFIG = SentencePieceConfig(vocab_size=500)


def train(config: SentencePieceConfig = CONFIG, documents: list[str] | None = None) -> SentencePieceTokenizer:
    return build(config, TokenizerContext(documents=lambda: documents or sample_documents()))


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return train()


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_contract(model_type) -> None:  # type: ignore[no-untyped-def]
    check_tokenizer(build, SentencePieceConfig(500, model_type=model_type), other_process=model_type == "bpe")


def test_vocabulary(tokenizer: SentencePieceTokenizer) -> None:
    assert tokenizer.vocab_size == 500
    assert list(tokenizer.special_tokens) == list(SPECIAL_TOKENS)
    assert list(tokenizer.special_tokens.values()) == list(range(491, 500))
    text = sample_documents()[0]
    assert len(tokenizer.encode(text)) < len(text) / 1.5


def test_its_own_sign_for_a_space_stays_apart_from_a_space(tokenizer: SentencePieceTokenizer) -> None:
    assert tokenizer.encode("a\u2581b") != tokenizer.encode("a b")
    assert tokenizer.decode(tokenizer.encode("\u2581\u2581 \u2581")) == "\u2581\u2581 \u2581"


def write_model(path: Path, **options) -> Path:  # type: ignore[no-untyped-def]
    with path.open("wb") as file:
        exact = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False,
                 "byte_fallback": True}  # fmt: skip
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample_documents()), model_writer=file, vocab_size=400, model_type="bpe",
            minloglevel=2, **{**exact, **options},
        )  # fmt: skip
    return path


def test_model_file(tmp_path: Path) -> None:
    config = SentencePieceConfig(model_file=write_model(tmp_path / "a.model"))
    tokenizer = check_tokenizer(build, config, list, other_process=False)
    assert tokenizer.vocab_size == 409
    with pytest.raises(ConfigError, match=r"^vocab_size: it is 400, but .* has 409"):
        build(SentencePieceConfig(400, tmp_path / "a.model"), TokenizerContext(documents=list))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"byte_fallback": False}, "byte_fallback"),
        ({"add_dummy_prefix": True}, "changes text"),
        ({"normalization_rule_name": "nmt_nfkc"}, "changes text"),
        ({"remove_extra_whitespaces": True}, "changes text"),
    ],
)
def test_model_files_that_are_not_exact(tmp_path: Path, options, message: str) -> None:  # type: ignore[no-untyped-def]
    config = SentencePieceConfig(model_file=write_model(tmp_path / "a.model", **options))
    with pytest.raises(ConfigError, match=rf"^model_file: .*{message}"):
        build(config, TokenizerContext(documents=list))


def test_no_model_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.model").write_text("nothing")
    with pytest.raises(ConfigError, match=r"^model_file: "):
        build(SentencePieceConfig(model_file=tmp_path / "a.model"), TokenizerContext(documents=list))
    with pytest.raises(ValueError, match="is not a file"):
        SentencePieceConfig(model_file=tmp_path / "b.model")


def test_damaged_files(tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    def load(config: SentencePieceConfig = CONFIG) -> None:
        build(config, TokenizerContext(documents=list, saved=tmp_path))

    with pytest.raises(CheckpointError, match="restore"):
        load()
    tokenizer.save(tmp_path)
    with pytest.raises(CheckpointError, match="start a new run"):
        load(SentencePieceConfig(vocab_size=600))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    train(documents=sample_documents(200)).save(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="fingerprint"):
        load()
    (tmp_path / "sentencepiece.model").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="restore"):
        load()


def test_too_few_documents() -> None:
    with pytest.raises(DataError, match=r"^vocab_size: sentencepiece can't learn 500 pieces"):
        train(documents=["few words"])


def test_errors_of_the_documents_pass_through() -> None:
    def documents():  # type: ignore[no-untyped-def]
        yield "one"
        raise DataError("shard_00003.parquet is damaged")

    with pytest.raises(DataError, match="shard_00003"):
        build(CONFIG, TokenizerContext(documents=documents))
