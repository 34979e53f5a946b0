from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

import pytest
import tiktoken.registry
from helpers.support import call

from nanochat_core.cli import main
from nanochat_core.cli.tokenizer import TEXTS


@pytest.fixture(autouse=True)
def _no_encodings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "none"))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})


@pytest.fixture
def bpe(tiny: Path) -> Path:
    """An experiment whose tokenizer is trained."""
    text = tiny.read_text().replace('plugin = "bytes"', 'plugin = "bpe"\nvocab_size = 280', 1)
    tiny.write_text(text)
    return tiny


def test_train(bpe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path / "home"))
    first, second = call("tokenizer", "train", bpe), call("tokenizer", "train", bpe)
    assert first.code == second.code == 0
    assert first.out.startswith("tokenizer bpe: 280 tokens, created in ")
    assert second.out.startswith("tokenizer bpe: 280 tokens, already in the cache\n")
    directory = Path(first.out.splitlines()[-1])
    assert (directory / "merges.tiktoken").is_file()
    assert first.out.splitlines()[1:] == second.out.splitlines()[1:]
    other = call("tokenizer", "train", bpe, "--set", "tokenizer.vocab_size=275")
    assert Path(other.out.splitlines()[-1]) != directory


def test_train_says_what_is_wrong(bpe: Path) -> None:
    result = call("tokenizer", "train", bpe, "--set", "tokenizer.vocab_size=90000")
    assert result.code == 2
    assert "tokenizer.vocab_size: 90000 tokens are too many: the training documents give" in result.err


def test_show(trained, bpe: Path) -> None:  # type: ignore[no-untyped-def]
    result = call("tokenizer", "show", trained.path, "a\nö", "--ids", "--trust")
    assert result.out == "a|\\n|\\xc3|\\xb6\n97 10 195 182\n4 tokens, 4 bytes, 1.00 bytes per token\n"
    result = call("tokenizer", "show", "tiny", "", "--runs-dir", trained.runs)
    assert result.out == "\n0 tokens, 0 bytes\n"
    assert call("tokenizer", "show", bpe, "seven, eight").out.startswith("s|even|,| |e|i|g|h|t\n")


def test_show_reads_the_pipe_and_colours_terminals(trained, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab"))
    assert call("tokenizer", "show", trained.path, "--trust").out.startswith("a|b\n")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = on_terminal("tokenizer", "show", str(trained.path), "ab", "--trust")
    assert coloured.count("\x1b[48;5;") == 2
    assert "|" not in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert on_terminal("tokenizer", "show", str(trained.path), "ab", "--trust").startswith("a|b\n")


def on_terminal(*arguments: str) -> str:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    with contextlib.redirect_stdout(out):
        assert main(arguments) == 0
    return out.getvalue()


def test_compare(trained, bpe: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "own.txt").write_text("one, two, three, four\n" * 9)
    name = f"tiny/{trained.path.name}"
    result = call("tokenizer", "compare", bpe, name, "--text", tmp_path / "own.txt", "--runs-dir", trained.runs)
    assert result.code == 0, result.err
    header, vocabulary, *rows = (line.split() for line in result.out.splitlines())
    assert header == ["BYTES", "PER", "TOKEN", "BYTES", "tiny", name]
    assert vocabulary[-2:] == ["280", "265"]
    by_name = {row[0]: row for row in rows}
    assert set(by_name) == {*TEXTS, "own.txt", "validation"}
    assert all(row[-1] == "1.00" for row in rows)
    assert float(by_name["own.txt"][-2]) > 1.5
    assert "gpt2 is not compared" in result.err


def test_references_that_mean_nothing(tmp_path: Path) -> None:
    for action in ("show", "compare"):
        result = call("tokenizer", action, "nothing", "--runs-dir", tmp_path)
        assert result.code == 2
        assert "no run 'nothing'" in result.err
    result = call("tokenizer", "compare", "o200k_base", "--runs-dir", tmp_path)
    assert result.code == 2
    assert "isn't in tiktoken's cache" in result.err
