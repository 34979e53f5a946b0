"""Which files are the data, for every source that reads files: the sources find them with one function."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from nanochat_core import DataError, expand_path, find_files, refuse_shared

Make = Callable[[str], Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes a file of that name below ``tmp_path / "data"``."""

    def make(name: str) -> Path:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(name))
        return path

    return make


def names(root: Path, *places: str) -> list[str]:
    found = find_files([str(root / place) for place in places], [".txt", ".txt.gz"], "path")
    return [str(path.relative_to(root)) for path in found]


def test_names_that_begin_with_a_dot(make: Make, tmp_path: Path) -> None:
    for name in ("a.txt", "._a.txt", ".hidden.txt", ".git/b.txt", "sub/c.TXT", "sub/.ipynb_checkpoints/c.txt", "d.md"):
        make(name)
    data = tmp_path / "data"
    assert names(data, "") == ["a.txt", "sub/c.TXT"]
    assert names(data, "*.txt") == ["a.txt"]
    assert names(data, "**/*.[tT][xX][tT]") == ["a.txt", "sub/c.TXT"]
    assert names(data, ".hid*.txt", ".git", "._a.txt") == [".hidden.txt", ".git/b.txt", "._a.txt"]
    assert names(data, "**/.*/*.txt") == [".git/b.txt", "sub/.ipynb_checkpoints/c.txt"]


def test_links(make: Make, tmp_path: Path) -> None:
    make("a.txt")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("b")
    data = tmp_path / "data"
    (data / "link").symlink_to(tmp_path / "elsewhere")
    assert names(data, "") == names(data, "**/*.txt") == ["a.txt", "link/b.txt"]
    (data / "gone.txt").symlink_to("nowhere/gone.txt")
    for place in ("", "*.txt", "gone.txt"):
        with pytest.raises(DataError, match=r"gone\.txt is a link to 'nowhere/gone\.txt', which does not exist"):
            names(data, place)
    (data / "gone.txt").unlink()
    (data / "circle").symlink_to(data)
    with pytest.raises(DataError, match="is a link to a directory that holds it"):
        names(data, "")


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_one_file_under_two_names(make: Make, tmp_path: Path, link: Callable[[Path, Path], None]) -> None:
    path, other = make("a.txt"), tmp_path / "data" / "b.txt"
    link(path, other)
    with pytest.raises(DataError, match=r"b\.txt is the same file as .*a\.txt; name it once"):
        names(tmp_path / "data", "")
    with pytest.raises(DataError, match=r"a\.txt is named twice"):
        names(tmp_path / "data", "a.txt", "a*.txt")
    with pytest.raises(DataError, match=r"val_path: .*b\.txt is among the training files too, as .*a\.txt"):
        refuse_shared([path], [other], "val_path")


def test_only_regular_files(make: Make, tmp_path: Path) -> None:
    make("dir.txt/b.txt")
    data = tmp_path / "data"
    assert names(data, "") == ["dir.txt/b.txt"]
    with pytest.raises(DataError, match="matches only directories"):
        names(data, "*.txt")
    os.mkfifo(data / "pipe.txt")
    with pytest.raises(DataError, match=r"pipe\.txt is not a regular file"):
        names(data, "")
    (data / "pipe.txt").unlink()
    (data / "zero.txt").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"zero\.txt is not a regular file"):
        names(data, "")
    (data / "zero.txt").unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(data / "socket.txt"))
        with pytest.raises(DataError, match=r"socket\.txt is not a regular file"):
            names(data, "")


@pytest.mark.parametrize("place", ["x" * 5000, "a\0b", "nowhere", "none/*.txt", "x" * 5000 + "*", "~nobody-at-all/x"])
def test_places_that_are_none(make: Make, tmp_path: Path, place: str) -> None:
    make("a.txt")
    with pytest.raises(DataError) as caught:
        find_files(place if place.startswith("~") else str(tmp_path / place), [".txt"], "path")
    assert len(str(caught.value)) < 6000


def test_names_that_are_not_utf8(make: Make, tmp_path: Path) -> None:
    make("caf\udce9/a.txt")
    (found,) = find_files(str(tmp_path / "data"), [".txt"], "path")
    assert found.read_bytes() == b"caf\xe9/a.txt"
    with pytest.raises(ValueError, match="must be UTF-8"):
        expand_path("caf\udce9")
    with pytest.raises(ValueError, match="home directory that is unknown"):
        expand_path("~nobody-at-all/x")
