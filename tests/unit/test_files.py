"""Locks and whole writes."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat_core.files import is_locked, lock_file


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
