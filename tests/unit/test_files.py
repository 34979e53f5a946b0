"""Files outside of a run, and how files are written."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanochat_core.files import cache_dir, rank_log_name, remove, write_atomic


def test_atomic_writes_leave_nothing_else(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a.json", "1")
    write_atomic(tmp_path / "a.json", "ü")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "ü"


def test_an_atomic_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "a.json", "old")

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_atomic(tmp_path / "a.json", "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.json", "old")]


def test_cache_dir_is_created_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path / "a" / "b"))
    assert cache_dir() == tmp_path / "a" / "b"
    assert cache_dir().is_dir()
    monkeypatch.delenv("NANOCHAT_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "nanochat"


def test_rank_log_name_of_the_first_rank_is_the_log_of_the_run() -> None:
    assert (rank_log_name(0), rank_log_name(12)) == ("log.txt", "logs/rank_012.txt")


def test_remove_takes_files_directories_and_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "directory" / "below").mkdir(parents=True)
    (tmp_path / "file").touch()
    for name in ("directory", "file", "nothing"):
        remove(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
