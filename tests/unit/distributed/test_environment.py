"""Variables of a launcher that are odd, missing or left over are refused, and none of them is needed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from nanochat_core.distributed.environment import (
    Place,
    check_nproc,
    find_place,
    is_worker,
    python_command,
    python_environment,
)
from nanochat_core.errors import ConfigError

TWO = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def setenv(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_a_process_without_variables_is_alone() -> None:
    assert find_place() == Place(0, 1, 0)
    assert not is_worker()


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        (TWO, Place(1, 2, 1)),
        ({"WORLD_SIZE": "1"}, Place(0, 1, 0)),
        ({"WORLD_SIZE": "", "RANK": ""}, Place(0, 1, 0)),
        ({"RANK": "0"}, Place(0, 1, 0)),
        ({"MASTER_ADDR": "left over", "MASTER_PORT": "x"}, Place(0, 1, 0)),
    ],
)
def test_places(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], place: Place) -> None:
    setenv(monkeypatch, variables)
    assert find_place() == place


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "1"}, r"RANK: is 1, but WORLD_SIZE is not set"),
        ({**TWO, "RANK": "2"}, r"RANK: is 2, but WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "2"}, r"WORLD_SIZE: is 2, but RANK, MASTER_ADDR, MASTER_PORT are not set"),
        ({**TWO, "MASTER_ADDR": " "}, r"but MASTER_ADDR is not set"),
        ({**TWO, "WORLD_SIZE": "x"}, r"WORLD_SIZE: is 'x', not a whole number"),
        ({**TWO, "WORLD_SIZE": "0"}, r"WORLD_SIZE: is '0'"),
        ({**TWO, "WORLD_SIZE": "²"}, r"WORLD_SIZE: is '²'"),
        ({**TWO, "WORLD_SIZE": "9" * 5000}, r"WORLD_SIZE: is '9{20,80}\.\.\., not"),
        ({**TWO, "RANK": "-1"}, r"RANK: is '-1'"),
        ({**TWO, "RANK": "1.0"}, r"RANK: is '1\.0'"),
        ({**TWO, "LOCAL_RANK": "one"}, r"LOCAL_RANK: is 'one'"),
        ({**TWO, "MASTER_PORT": "65536"}, r"MASTER_PORT: is '65536'"),
        ({**TWO, "MASTER_PORT": "\x1b[2J"}, r"MASTER_PORT: is '\\x1b\[2J'"),
    ],
)
def test_odd_variables_are_refused(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str) -> None:
    setenv(monkeypatch, variables)
    with pytest.raises(ConfigError, match=message) as caught:
        find_place()
    assert "unset" in str(caught.value)


def test_a_number_of_processes_that_is_not_the_jobs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_nproc(8)
    setenv(monkeypatch, TWO)
    check_nproc(1)
    check_nproc(2)
    with pytest.raises(ConfigError, match=r"--nproc: is 3, but WORLD_SIZE is 2"):
        check_nproc(3)


def test_a_child_imports_what_we_import_and_nothing_from_its_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "only_ours.py").write_text("import csv, os\nprint(os.environ['MORE'], csv.__file__)")
    (tmp_path / "csv.py").write_text("raise SystemExit(9)")
    monkeypatch.syspath_prepend(tmp_path / "ours")
    done = subprocess.run(
        python_command("only_ours"),
        cwd=tmp_path,
        env=python_environment({"MORE": "more"}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("more ")
    assert str(tmp_path) not in done.stdout
    assert "MORE" not in os.environ
