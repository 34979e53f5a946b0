"""``nanochat runs``: one bad run never hides the others."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.fuzzing import well_behaved
from helpers.support import Trained

RECORD = b'{"step": 3, "time": 1.0, "train/loss": 2.0}\n'


def put(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda run: (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def append(content: bytes) -> Callable[[Path], object]:
    def change(run: Path) -> None:
        with (run / "metrics.jsonl").open("ab") as file:
            file.write(content)

    return change


def special(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def change(run: Path) -> None:
        (run / name).unlink()
        make(run / name)

    return change


DAMAGE: dict[str, Callable[[Path], object]] = {
    "status is a list": put("status.json", "[]"),
    "status is cut": put("status.json", '{"status": "fini'),
    "step is a text": put("status.json", '{"status": "finished", "step": "4"}'),
    "step is huge": put("status.json", '{"status": "finished", "step": 1' + "0" * 400 + "}"),
    "time is a list": put("status.json", '{"status": "finished", "time": []}'),
    "status with escapes": put("status.json", '{"status": "\\u001b[2J"}'),
    "status nested": put("status.json", "[" * 100_000),
    "provenance is a list": put("provenance.json", "[]"),
    "fingerprints are a list": put("provenance.json", '{"fingerprints": []}'),
    "fingerprints are numbers": put("provenance.json", '{"fingerprints": {"val": 3}}'),
    "earlier is a text": put("provenance.json", '{"earlier": "x"}'),
    "earlier has texts": put("provenance.json", '{"earlier": ["x"]}'),
    "other data are a list": put("provenance.json", '{"other_data": []}'),
    "step of other data": put("provenance.json", '{"other_data": {"from_step": "x", "before": {"val": "x"}}}'),
    "NULs in the ledger": append(b"\0" * 512 + b"\n"),
    "no JSON in the ledger": append(b"garbage\n"),
    "bytes in the ledger": append(b"\xff\xfe\n"),
    "a list in the ledger": append(b"[]\n"),
    "no step in the ledger": append(b'{"train/loss": 1.0}\n'),
    "a text as step in the ledger": append(b'{"step": "1", "train/loss": 1.0}\n'),
    "nested in the ledger": append(b"[" * 100_000 + b"\n"),
    "a huge metric in the ledger": append(b'{"step": 1, "val/bpb": 1' + b"0" * 400 + b"}\n"),
    "ledger is a directory": special("metrics.jsonl", Path.mkdir),
    "ledger is a pipe": special("metrics.jsonl", os.mkfifo),
    "ledger never ends": special("metrics.jsonl", lambda path: path.symlink_to("/dev/zero")),
    "status is a pipe": special("status.json", os.mkfifo),
    "provenance is a directory": special("provenance.json", Path.mkdir),
    "experiment is no TOML": put("experiment.toml", "x = ["),
    "experiment is a directory": special("experiment.toml", Path.mkdir),
    "experiment is a pipe": special("experiment.toml", os.mkfifo),
    "experiment of bytes": put("experiment.toml", b"\xff\xfe"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_run_is_listed_as_damaged(trained: Trained, tmp_path: Path, what: str) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(trained.runs, runs)
    shutil.copytree(trained.path, runs / "bad" / trained.path.name)
    DAMAGE[what](runs / "bad" / trained.path.name)
    result = well_behaved("runs", "--runs-dir", runs, codes=(0,))
    _, *rows = result.out.splitlines()
    (bad,) = [row for row in rows if row.startswith("bad ")]
    (good,) = [row for row in rows if row.startswith("tiny ")]
    assert " damaged " in bad
    assert " finished " in good
    assert "12/12" in good
    assert f"bad/{trained.path.name}/" in result.err


@pytest.mark.parametrize("name", ["x\x1b[2Jy", "a\nb", "caf\udce9"])
def test_names_of_others_show_no_control_characters(trained: Trained, tmp_path: Path, name: str) -> None:
    shutil.copytree(trained.path, tmp_path / name / trained.path.name)
    result = well_behaved("runs", "--runs-dir", tmp_path, codes=(0,))
    assert len(result.out.splitlines()) == 2
    result.out.encode()
