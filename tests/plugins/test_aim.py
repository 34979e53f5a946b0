"""A real Aim repository, read back with Aim's own SDK and its web server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import Process
from helpers.support import call, ledger, losses, metrics

aim = pytest.importorskip("aim")


def read(repository: Path) -> Any:
    """The only run of a repository."""
    (run,) = aim.Repo(str(repository)).iter_runs()
    return run


def series(run: Any, name: str) -> dict[int, float]:
    (found,) = [metric for metric in run.metrics() if metric.name == name]
    steps, columns = found.data.items_list()
    assert len(steps) == len(set(steps))
    return dict(zip(steps, columns[0], strict=True))


def test_a_resumed_run_goes_on_in_the_same_run_with_every_step_once(logged: Path) -> None:
    run = read(logged.parents[1])
    assert json.loads((logged / "aim_run.json").read_text()) == {str(logged.parents[1]): run.hash}
    names = {n for record in ledger(logged) for n, v in record.items() if not isinstance(v, str)} - {"step", "time"}
    assert {metric.name for metric in run.metrics()} == names
    for name in names:
        assert series(run, name) == metrics(logged, name)
    assert not run.active
    assert run["run", "status"] == "finished"
    assert run["run", "group"] == "arms"
    assert run["experiment", "model"]["plugin"] == "gpt"
    assert run.experiment == "nanochat"
    assert set(run.tags) == {"a", "b", "seed-1337"}
    texts = {found["name"] for found in run.collect_sequence_info("texts")["texts"]}
    assert "evaluations" in texts
    assert "samples/0" in texts


def test_the_web_server_shows_it(logged: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("aim")), "up", "--repo", str(logged.parents[1]), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline, page = time.monotonic() + 300, b""
        while not page:
            assert time.monotonic() < deadline, "the web server does not answer"
            try:
                page = urllib.request.urlopen(f"http://127.0.0.1:{port}/api/projects/activity", timeout=5).read()
            except OSError:
                time.sleep(0.2)
        assert json.loads(page)["num_runs"] == 1
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_two_runs_start_in_one_new_repository(trained: Any, tmp_path: Path) -> None:
    runs, repo = tmp_path / "runs", tmp_path / "repo"
    for name in ("a", "b"):
        shutil.copytree(trained.path, runs / "tiny" / name)
    words = ("--to", "aim", "--set", f"repo={repo}", "--runs-dir", runs)
    both = [Process([sys.executable, "-m", "nanochat_core", "log-sync", f"tiny/{name}", *words]) for name in ("a", "b")]
    for code, out, err in [process.end() for process in both]:
        assert code == 0, out + err
    assert len(list(aim.Repo(str(repo)).iter_runs())) == 2


def test_a_repository_that_was_made_only_in_part(trained: Any, tmp_path: Path) -> None:
    (tmp_path / ".aim" / "locks").mkdir(parents=True)
    (tmp_path / ".aim" / "locks" / "structured_db_lock").touch()  # it was killed with this in its hand
    shutil.copytree(trained.path, tmp_path / "tiny" / "a")
    sent = call("log-sync", "tiny/a", "--to", "aim", "--set", f"repo={tmp_path}", "--runs-dir", tmp_path)
    assert sent.code == 0, sent.err
    assert series(read(tmp_path), "train/loss") == losses(trained.path)


def test_a_run_that_never_had_it_is_sent_later(trained: Any, tmp_path: Path) -> None:
    where = f"{trained.path.parent.name}/{trained.path.name}"
    arguments = ("log-sync", where, "--to", "aim", "--set", f"repo={tmp_path}", "--runs-dir", trained.runs)
    assert call(*arguments).code == 0
    assert series(read(tmp_path), "train/loss") == losses(trained.path)
    again = call(*arguments)
    assert again.code == 0
    assert " 0 records sent, 0 missing" in again.out
    assert series(read(tmp_path), "val/bpb") == metrics(trained.path, "val/bpb")
