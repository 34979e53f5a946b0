from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanochat_core.cli import main


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path / "home"))
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i:04d} " + "x" * 986}) + "\n" for i in range(200)))
    return path


def experiment(data: Path, tokenizer: str) -> Path:
    path = data.with_name("my.toml")
    path.write_text(
        f'[tokenizer]\n{tokenizer}\n[data]\nplugin = "jsonl"\npath = "{data}"\n[model]\nplugin = "gpt"\ndepth = 2\n'
        '[optimizer]\nplugin = "adamw"\n[train]\nmax_seq_len = 64\ndevice_batch_size = 2\ntotal_batch_size = 128\n'
        "num_iterations = 3000\n"
    )
    return path


def test_info_of_a_source(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "info", "--source", "jsonl", "--set", f"data.path={data}"]) == 0
    out = capsys.readouterr().out
    assert "files: 1\nbytes: 202.6 kB\ndocuments: 190 for training, 10 for validation\n" in out
    assert "training text: 190.0 kB, about 45,238 tokens (assuming 4.2 bytes per token" in out
    assert "  | document 0000 xxx" in out


def test_info_of_an_experiment(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "info", str(experiment(data, 'plugin = "bytes"'))]) == 0
    out = capsys.readouterr().out
    assert "about 190,190 tokens (measured on 190 documents)" in out  # each has 1,000 bytes and bos
    assert "the run trains on 384,000 tokens: about 2.02 epochs" in out
    assert main(["data", "info", str(experiment(data, 'plugin = "bpe"\nvocab_size = 512'))]) == 0
    assert "the run trains on 384,000 tokens: about 8.49 epochs" in capsys.readouterr().out


def test_info_names_what_is_skipped(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data.write_text(data.read_text() + "no JSON\n" * 100)
    words = ["data", "info", "--source", "jsonl", "--set", f"data.path={data}"]
    assert main(words) == 2
    assert "data.on_error: the document at byte 202,600 of" in capsys.readouterr().err
    assert main([*words, "--set", "data.on_error=skip"]) == 0
    assert "skipped: the document at byte 202,600 of" in capsys.readouterr().err


def test_download_of_what_is_here(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "download", str(experiment(data, 'plugin = "bytes"'))]) == 0
    assert capsys.readouterr().out == "all files are present\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--source", "jsnl"], '--source jsnl: no such data source (did you mean "jsonl"?)'),
        (["--source", "jsonl"], "--source jsonl: data.path: missing"),
        (["--source", "jsonl", "--set", "path=x"], "write data.OPTION=VALUE, not 'path=x'"),
        (
            ["--source", "jsonl", "--set", "data.path=x", "-n", "3"],
            '-n: data source "jsonl" does not consist of shards',
        ),
        (["--source", "jsonl", "--set", "data.path=x", "--set", "data.on_error=no"], 'must be "fail" or "skip"'),
        (["--source", "jsonl", "--set", "data.path=nowhere"], "nowhere does not exist"),
    ],
)
def test_mistakes(words: list[str], message: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "info", *words]) == 2
    assert message in capsys.readouterr().err


def test_problems_name_file_and_line(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = experiment(data, 'plugin = "bytes"')
    data.unlink()
    assert main(["data", "info", str(file)]) == 2
    assert f"{file}:5: data.path: {data} does not exist" in capsys.readouterr().err
