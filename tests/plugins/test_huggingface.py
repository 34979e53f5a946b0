from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanochat_core import SPECIAL_TOKENS, CheckpointError, ConfigError, TokenizerContext
from nanochat_core.testing import check_tokenizer, sample_documents
from nanochat_huggingface.config import HuggingFaceConfig

tokenizers = pytest.importorskip("tokenizers")

from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

from nanochat_huggingface.tokenizer import build  # noqa: E402


def write(path: Path, special: tuple[str, ...] = ("<|endoftext|>",)) -> Path:
    """A byte-level tokenizer with everything that would change text."""
    made = tokenizers.Tokenizer(models.BPE(dropout=0.1))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    made.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(sample_documents(), trainer)
    made.post_processor = processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=[(special[0], 0)])
    made.enable_truncation(5)
    made.enable_padding()
    made.add_tokens(["added word"])
    made.save(str(path))
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceConfig:
    return HuggingFaceConfig(write(tmp_path_factory.mktemp("hf") / "tokenizer.json"))


def make(config: HuggingFaceConfig) -> Any:
    return build(config, TokenizerContext(documents=list))


def test_contract(config: HuggingFaceConfig) -> None:
    tokenizer = check_tokenizer(build, config, list, other_process=False)
    assert tokenizer.vocab_size == 501 + 9
    assert tokenizer.special_tokens["<|endoftext|>"] == 0
    assert [tokenizer.special_tokens[name] for name in SPECIAL_TOKENS] == list(range(501, 510))
    text = sample_documents()[0]
    assert len(tokenizer.encode(text)) < len(text) / 1.5


def test_ids_are_those_of_the_file(config: HuggingFaceConfig) -> None:
    reference = tokenizers.Tokenizer.from_file(str(config.path))
    tokenizer = make(config)
    for name, i in reference.get_vocab().items():
        assert tokenizer.decode_bytes([i]) == (reference.decode([i]).encode() if i and name.isascii() else
                                               tokenizer.decode_bytes([i]))  # fmt: skip
    assert tokenizer.decode_bytes(tokenizer.encode("an added word here")) == b"an added word here"
    assert 500 in tokenizer.encode("an added word here")


def test_special_tokens_of_the_file_are_used(tmp_path: Path) -> None:
    tokenizer = check_tokenizer(build, HuggingFaceConfig(write(tmp_path / "t.json", SPECIAL_TOKENS)), list,
                                other_process=False)  # fmt: skip
    assert tokenizer.bos_id == 0
    assert tokenizer.vocab_size == 501


def change(config: HuggingFaceConfig, path: Path, **parts: Any) -> HuggingFaceConfig:
    content = json.loads(config.path.read_text())
    path.write_text(json.dumps({**content, **parts}))
    return HuggingFaceConfig(path)


def test_files_that_are_not_exact(config: HuggingFaceConfig, tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    words.save(str(tmp_path / "words.json"))
    with pytest.raises(ConfigError, match=r"^path: .*(byte-level|spelled in bytes)"):
        make(HuggingFaceConfig(tmp_path / "words.json"))
    pieces = tokenizers.Tokenizer(models.BPE({"\u2581a": 0, "a": 1, "\u2581": 2}, []))
    pieces.save(str(tmp_path / "pieces.json"))
    with pytest.raises(ConfigError, match='plugin = "sentencepiece"'):
        make(HuggingFaceConfig(tmp_path / "pieces.json"))
    with pytest.raises(ConfigError, match="changes text"):
        make(change(config, tmp_path / "lossy.json", pre_tokenizer={"type": "Sequence", "pretokenizers": [
            {"type": "WhitespaceSplit"}, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                                          "use_regex": True}]}))  # fmt: skip


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": {"type": "BPE"}}'])
def test_files_that_are_no_tokenizer(tmp_path: Path, content: str) -> None:
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ConfigError, match=r"^path: (it is not a|tokenizers can't read this) tokenizer\.json"):
        make(HuggingFaceConfig(tmp_path / "t.json"))
    with pytest.raises(ValueError, match="is not a file"):
        HuggingFaceConfig(tmp_path / "absent.json")


def test_damaged_files(config: HuggingFaceConfig, tmp_path: Path) -> None:
    def load() -> None:
        build(config, TokenizerContext(documents=list, saved=tmp_path))

    with pytest.raises(CheckpointError, match="restore"):
        load()
    make(config).save(tmp_path)
    load()
    content = (tmp_path / "tokenizer.json").read_text()
    for wrong in (content.replace("{", "{ ", 1), content[:-9], ""):
        (tmp_path / "tokenizer.json").write_text(wrong)
        with pytest.raises(CheckpointError, match="start a new run"):
            load()


@pytest.mark.parametrize("option", ["lstrip", "rstrip", "single_word", "normalized"])
def test_added_tokens_keep_the_blanks_beside_them(config: HuggingFaceConfig, tmp_path: Path, option: str) -> None:
    content = json.loads(config.path.read_text())
    for token in content["added_tokens"]:
        token[option] = True
    tokenizer = make(change(config, tmp_path / "t.json", added_tokens=content["added_tokens"]))
    for text in ("an  added word \n here", "xadded wordx", " added word "):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "step",
    [
        {"type": "Split", "pattern": {"String": "\u1e9e"}, "behavior": "Removed", "invert": False},
        {"type": "CharDelimiterSplit", "delimiter": "\u2603"},
        {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never", "split": False},
    ],
)
def test_steps_that_drop_characters(config: HuggingFaceConfig, tmp_path: Path, step: dict[str, Any]) -> None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    steps = {"type": "Sequence", "pretokenizers": [{"type": "Sequence", "pretokenizers": [step]}, byte_level]}
    with pytest.raises(ConfigError, match=rf"changes text: its pre_tokenizer has the step '{step['type']}'"):
        make(change(config, tmp_path / "t.json", pre_tokenizer=steps))


def test_a_byte_order_mark_in_front(config: HuggingFaceConfig, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(b"\xef\xbb\xbf" + config.path.read_bytes())
    assert make(HuggingFaceConfig(tmp_path / "t.json")).fingerprint == make(config).fingerprint


def test_only_regular_files(tmp_path: Path) -> None:
    for path in (Path("/dev/zero"), Path("x" * 5000), tmp_path):
        with pytest.raises(ValueError, match=r"is not a file.*set it to a tokenizer\.json"):
            HuggingFaceConfig(path)
