"""Closed, full and narrow standard streams: a command works without them, or says that its output is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.support import Trained


def shell(command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[bytes]:
    """Run ``command`` in a shell in which ``$N`` is nanochat."""
    return subprocess.run(
        ["bash", "-c", command],
        cwd=cwd,
        env={**os.environ, "N": f"{sys.executable} -m nanochat_core", **env},
        capture_output=True,
        timeout=300,
    )


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-", "2>/dev/full"])
def test_closed_streams_do_not_matter(closed: str, tmp_path: Path) -> None:
    done = shell(f"$N runs {closed}", tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    assert shell(f"$N show none.toml {closed}", tmp_path).returncode == 2


def test_a_run_trains_without_streams(tiny: Path, tmp_path: Path) -> None:
    done = shell(f"$N run {tiny} --set train.num_iterations=1 >&- 2>&-", tmp_path)
    assert done.returncode == 0
    (status,) = tmp_path.glob("runs/tiny/*/status.json")
    assert '"finished"' in status.read_text()
    assert "The run is in" in (status.parent / "log.txt").read_text()


@pytest.mark.parametrize("command", ["runs", "plugins"])
def test_output_that_is_lost_is_an_error(command: str, tmp_path: Path) -> None:
    done = shell(f"$N {command} >/dev/full", tmp_path)
    assert done.returncode == 2
    assert done.stderr == b"stdout can't be written (No space left on device): the rest of it is dropped\n"


def test_what_a_command_opens_does_not_get_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    code = (
        "import os, sys; from nanochat_core.cli.streams import prepare_streams; prepare_streams(goes_on=False)\n"
        "print('lost'); file = open('file', 'w'); assert file.fileno() > 2; sys.stderr.write('lost')\n"
        "assert os.path.samestat(os.fstat(1), os.stat(os.devnull))"
    )
    done = shell(f'{sys.executable} -c "{code}" >&- 2>&- <&-', tmp_path)
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == ""


def test_a_stdin_that_was_read_stays_as_it_is(tmp_path: Path) -> None:
    code = "import sys; sys.stdin.readline(); from nanochat_core.cli import main; sys.exit(main(['runs']))"
    done = shell(f'echo x | {sys.executable} -c "{code}"', tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_characters_that_an_encoding_lacks_are_escaped(encoding: str, trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "экс").symlink_to(trained.path.parent)
    listed = shell("$N runs", tmp_path, PYTHONIOENCODING=encoding)
    assert listed.returncode == 0, listed.stderr
    assert ("экс" if encoding == "utf-8" else r"\u044d\u043a\u0441") in listed.stdout.decode(encoding)


def test_a_text_that_is_not_utf8_is_continued(trained: Trained, tmp_path: Path) -> None:
    command = f"$N sample {trained.path} $'caf\\xe9' --max-tokens 9 --trust"
    for env in ({}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        done = shell(command, tmp_path, **env)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(b"caf")
    done = shell(f"printf 'caf\\xe9' | $N tokenizer show {trained.path} --trust", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"c|a|f|")
