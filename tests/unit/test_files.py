"""Files: atomic writes, locks, hashes, short lists."""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nanochat_core import file_sha256, first_few, open_atomic, write_atomic
from nanochat_core.errors import ConfigError
from nanochat_core.files import cache_dir, is_locked, lock_file


def test_an_atomic_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a.json", "1")
    write_atomic(tmp_path / "a.json", "ü")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "ü"
    write_atomic(tmp_path / "a.json", b"\x00\xff")
    assert (tmp_path / "a.json").read_bytes() == b"\x00\xff"


def test_an_atomic_write_that_fails_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, "old")

    def fail_half_way() -> None:
        with open_atomic(path) as file:
            file.write(b"half")
            assert path.read_text() == "old"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    with pytest.raises(OSError, match="No such file"):
        write_atomic(tmp_path / "absent" / "a.json", "1")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "old"


def test_atomic_writes_of_several_threads_do_not_mix(tmp_path: Path) -> None:
    path, texts = tmp_path / "a.txt", [letter * 100_000 for letter in "abcd"]

    def write(text: str) -> None:
        for _ in range(5):
            write_atomic(path, text)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_file_sha256_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_first_few_counts_the_rest() -> None:
    assert first_few([]) == ""
    assert first_few(["a", "b"], 2) == "a, b"
    assert first_few(["a", "b", "c", "d"], 2) == "a, b and 2 more"


def hold(path: Path) -> subprocess.Popen[str]:
    """A process that holds the lock until it is killed."""
    script = "import sys, time; from pathlib import Path; from nanochat_core.files import lock_file\n"
    script += "lock = lock_file(Path(sys.argv[1])); print('locked', flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def test_a_lock_says_who_holds_it_and_ends_with_the_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_locked(path)
    with hold(path) as process:
        assert is_locked(path)
        with pytest.raises(TimeoutError):
            lock_file(path, timeout=0)
        with pytest.raises(TimeoutError):
            lock_file(path, timeout=0.1)
        assert path.read_text() == f"process {process.pid} on {socket.gethostname()}\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not is_locked(path)
    with lock_file(path, timeout=0):
        assert path.read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    assert not is_locked(path)
    assert path.exists()


def test_asking_needs_no_right_to_write_and_hinders_nobody_who_asks(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with lock_file(path):
        pass
    path.chmod(0o444)
    tmp_path.chmod(0o555)
    try:
        with path.open() as other:
            fcntl.flock(other, fcntl.LOCK_SH)  # somebody else asks
            assert not is_locked(path)
    finally:
        tmp_path.chmod(0o755)


def test_a_file_that_was_deleted_while_it_was_locked_is_no_lock_any_more(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with lock_file(path):
        path.unlink()
        with lock_file(path, timeout=0):
            assert is_locked(path)


@pytest.mark.parametrize("place", ["a file", "a file/below", "/proc/none", "~nobody-here/x", "read only", "x" * 5000])
def test_a_cache_that_can_not_be_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").touch()
    (tmp_path / "read only").mkdir()
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).name != "read only")  # root may write everywhere
    monkeypatch.setenv("NANOCHAT_HOME", place)
    with pytest.raises(
        ConfigError, match=r"^the environment variable NANOCHAT_HOME: names no usable directory: "
    ) as error:
        cache_dir()
    assert "set it to a directory that you can write" in str(error.value)


def test_a_cache_without_a_home_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NANOCHAT_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", _nobody)
    with pytest.raises(
        ConfigError, match=r"NANOCHAT_HOME: is not set: '~' begins with a home directory that is not known"
    ):
        cache_dir()
    monkeypatch.setenv("HOME", "/proc")
    with pytest.raises(ConfigError, match=r"NANOCHAT_HOME: is not set: '/proc/.* can't be made a directory"):
        cache_dir()


def _nobody(uid: int) -> None:
    raise KeyError(uid)
