"""How far a logger got, on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanochat_core.loggers.progress import Progress, progress_file


def test_progress_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    for progress in (
        Progress(123456, "digest", {"": 7, "bpb": 4}, 2, "finished"),
        Progress(1),
    ):  # the second is shorter
        progress.write(file)
        assert Progress.read(file) == progress
    assert file.read_bytes().endswith(b"\n")


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"offset": 1, "unknown": 2}'])
def test_progress_that_cannot_be_read_starts_afresh(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    assert Progress.read(tmp_path / "x.json") == Progress()


def test_progress_is_kept_by_stream() -> None:
    progress = Progress()
    progress.note({"step": 4})
    progress.note({"step": 2, "evaluator": "bpb"})
    assert progress.already_told({"step": 4})
    assert not progress.already_told({"step": 5})
    assert progress.already_told({"step": 2, "evaluator": "bpb"})
    assert not progress.already_told({"step": 3, "evaluator": "bpb"})
    assert not progress.already_told({"step": 0, "evaluator": "samples"})


def test_progress_file_is_in_the_run(tmp_path: Path) -> None:
    assert progress_file(tmp_path, "csv") == tmp_path / "loggers" / "csv.json"
