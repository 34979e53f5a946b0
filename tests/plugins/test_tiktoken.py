from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import pytest
import tiktoken.registry

from nanochat_core import SPECIAL_TOKENS, CheckpointError, ConfigError, DataError, TokenizerContext
from nanochat_core.testing import check_tokenizer
from nanochat_tiktoken.config import TiktokenConfig
from nanochat_tiktoken.tokenizer import TiktokenTokenizer, build, read_merges

PATTERN = r"\p{L}+|\s+|\p{N}| ?[^\s\p{L}\p{N}]+"
MERGES = [b"th", b"he", b"the", b"in", b"ing", b"\n\n", b"  "]


@pytest.fixture
def merges(tmp_path: Path) -> Path:
    path = tmp_path / "small.tiktoken"
    tokens = [*(bytes([b]) for b in range(256)), *MERGES]
    path.write_text("".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens)))
    return path


@pytest.fixture
def config(merges: Path) -> TiktokenConfig:
    return TiktokenConfig(path=merges, pattern=PATTERN)


def make(config: TiktokenConfig) -> TiktokenTokenizer:
    return build(config, TokenizerContext(documents=list))


def test_contract(config: TiktokenConfig) -> None:
    tokenizer = check_tokenizer(build, config, list, other_process=False)
    assert tokenizer.vocab_size == 256 + len(MERGES) + 9
    assert list(tokenizer.special_tokens.items()) == [(name, 263 + i) for i, name in enumerate(SPECIAL_TOKENS)]
    assert tokenizer.encode("the thing") == [258, 32, 256, 260]


def test_special_tokens_of_the_encoding_stay_and_holes_mean_nothing() -> None:
    ranks = {bytes([b]): b for b in range(256)}
    tokenizer = TiktokenTokenizer(PATTERN, ranks, {"<|endoftext|>": 260})
    assert tokenizer.special_tokens["<|endoftext|>"] == 260
    assert tokenizer.bos_id == 261
    assert tokenizer.vocab_size == 270
    assert tokenizer.decode_bytes([257, 260, 65]) == b"<|endoftext|>A"
    assert tokenizer.token_bytes()[256:].tolist() == [0] * 14
    own = TiktokenTokenizer(PATTERN, ranks, {"<|bos|>": 256})
    assert dict(own.special_tokens) == {"<|bos|>": 256}


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of tiktoken's, and no encoding in memory."""
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    return cache


def test_a_named_encoding_is_never_downloaded(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(blobpath: str) -> bytes:
        raise AssertionError(f"downloads {blobpath}")

    monkeypatch.setattr(tiktoken.load, "read_file", download)
    with pytest.raises(DataError, match=r"^encoding: cl100k_base isn't in tiktoken's cache .*TIKTOKEN_CACHE"):
        make(TiktokenConfig("cl100k_base"))
    assert tiktoken.load.read_file is download
    with pytest.raises(ConfigError, match=r"tiktoken has no encoding 'cl200k'; it has .*gpt2"):
        make(TiktokenConfig("cl200k"))


def test_a_named_encoding_from_the_cache(offline: Path, merges: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "https://example.invalid/small.tiktoken"
    (offline / hashlib.sha1(url.encode()).hexdigest()).write_bytes(merges.read_bytes())

    def small():  # type: ignore[no-untyped-def]
        ranks = tiktoken.load.load_tiktoken_bpe(url)
        return {"name": "small", "pat_str": PATTERN, "mergeable_ranks": ranks, "special_tokens": {"<|end|>": 263}}

    monkeypatch.setattr(tiktoken.registry, "ENCODING_CONSTRUCTORS", {"small": small})
    tokenizer = make(TiktokenConfig("small"))
    assert tokenizer.encode("the") == [258]
    assert tokenizer.special_tokens["<|end|>"] == 263
    assert tokenizer.bos_id == 264


def test_a_run_needs_no_cache_once_it_is_saved(config: TiktokenConfig, merges: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    before = make(config)
    before.save(saved)
    merges.unlink()
    assert build(config, TokenizerContext(documents=list, saved=saved)).fingerprint == before.fingerprint


@pytest.mark.parametrize("damage", ["QQ== 1 2\n", "?? 5\n", "QUE= 5\n", "QUE= -1\n", None])
def test_files_of_merges_that_are_none(merges: Path, damage: str | None, config: TiktokenConfig) -> None:
    lines = merges.read_text().splitlines(keepends=True)
    merges.write_text("".join(lines[1:] if damage is None else [*lines, damage]))
    with pytest.raises(ConfigError, match=r"^path: .* is not a file of merges"):
        make(config)


def test_damaged_files(config: TiktokenConfig, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    tokenizer = make(config)

    def load() -> None:
        build(config, TokenizerContext(documents=list, saved=saved))

    with pytest.raises(CheckpointError, match="restore"):
        load()
    tokenizer.save(saved)
    assert read_merges(saved / "merges.tiktoken")[b"the"] == 258
    content = json.loads((saved / "tokenizer.json").read_text())
    for wrong in ({**content, "format": "x"}, {**content, "pattern": r"\s+|."}, {**content, "special_tokens": 1}, []):
        (saved / "tokenizer.json").write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match="start a new run"):
            load()


@pytest.mark.parametrize("wrong", [{}, {"encoding": "gpt2", "path": __file__, "pattern": "."}, {"path": __file__}])
def test_config(wrong) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"set (either encoding or path|both or neither)|belong together"):
        TiktokenConfig(**{k: Path(v) if k == "path" else v for k, v in wrong.items()})


def test_patterns_that_lose_text(merges: Path) -> None:
    with pytest.raises(ConfigError, match=r"^pattern: "):
        make(TiktokenConfig(path=merges, pattern=r"\p{L}+"))
    with pytest.raises(ConfigError, match=r"^pattern: "):
        make(TiktokenConfig(path=merges, pattern="("))
