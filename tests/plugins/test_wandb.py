"""Offline runs, read back record by record; and servers that can't be reached, or never answer."""

from __future__ import annotations

import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.logging_run import Run
from helpers.support import ROOT, call, ledger, losses, metrics, only_run, write_experiment
from helpers.waiting import wait_for
from helpers.wandb_server import WandbServer, serve

from nanochat_core.loggers.progress import Progress
from nanochat_core.plugins.discovery import load_plugins
from nanochat_core.runs.ledger import rewind_ledger

pytest.importorskip("wandb")


def records(run: Path) -> list[list[dict[str, Any]]]:
    """Records of every offline run in ``run``, oldest first."""
    found = []
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.splitlines()
        found.append([json.loads(line) for line in lines])
    return found


def history(run: Path) -> list[dict[str, Any]]:
    return [r["history"]["item"] for part in records(run) for r in part if r["type"] == "history"]


def series(rows: list[dict[str, Any]], name: str) -> dict[int, float]:
    pairs = [(row["step"], row[name]) for row in rows if name in row]
    assert len(pairs) == len(dict(pairs)), f"{name} was logged twice at a step"
    return dict(pairs)


def test_a_resumed_run_goes_on_in_the_same_run_with_every_step_once(logged: Path) -> None:
    first, second = records(logged)
    begins = [next(r["run"] for r in part if r["type"] == "run") for part in (first, second)]
    assert begins[0]["run_id"] == begins[1]["run_id"] == f"tiny-{logged.name}"
    assert begins[0]["project"] == "nanochat"
    assert begins[0]["run_group"] == "arms"
    assert set(begins[0]["tags"]) == {"a", "b", "seed-1337"}
    assert begins[0]["config"]["update"]["model"]["plugin"] == "gpt"
    assert [r["metric"]["step_metric"] for r in first if r["type"] == "metric"] == ["step"]
    for part in (first, second):
        assert [r["exit"]["exit_code"] for r in part if r["type"] == "exit"] == [0]
        said = [r["summary"]["update"] for r in part if "update" in r.get("summary", {})]
        assert [summary["status"] for summary in said if "status" in summary] == ["finished"]
    rows = history(logged)
    assert series(rows, "train/loss") == losses(logged)
    assert series(rows, "val/bpb") == metrics(logged, "val/bpb")
    assert {n for row in rows for n in row if not n.startswith(("_", "texts/", "evaluations"))} == {
        name for record in ledger(logged) for name, value in record.items() if not isinstance(value, str)
    } - {"time"}
    times = {record["step"]: record["time"] for record in ledger(logged) if "train/loss" in record}
    for row in rows:
        if "train/loss" in row and row["step"] >= 8:
            assert row["_timestamp"] == times[row["step"]]


def test_samples_and_evaluations_are_tables(logged: Path) -> None:
    last = logged.joinpath("wandb").glob("offline-run-*/files/media/table/**/*.json")
    tables = [json.loads(file.read_text()) for file in sorted(last)]
    texts = [row for table in tables if table["columns"] == ["step", "name", "text"] for row in table["data"]]
    rewound = (logged / "metrics.rewound.jsonl").read_text(encoding="utf-8").splitlines()
    before = {r["step"]: r["samples/0"] for r in map(json.loads, rewound) if "samples/0" in r}  # of the first part
    assert {row[0]: row[2] for row in texts if row[1] == "samples/0"} == before | metrics(logged, "samples/0")
    whole = max((t for t in tables if "evaluator" in t["columns"]), key=lambda t: len(t["data"]))
    assert {row[0]: row[3] for row in whole["data"] if row[2] == "val/bpb"} == metrics(logged, "val/bpb")


KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
from pathlib import Path
from helpers.logging_run import Run
from helpers.waiting import wait_for
run = Run(Path({directory!r})).start("wandb", mode="offline").train(0, 1)
progress = run.directory / "loggers" / "wandb.json"
wait_for(progress.exists)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_is_not_left_in_progress(tmp_path: Path) -> None:
    paths = [str(ROOT / "tests")]
    subprocess.run([sys.executable, "-c", KILLED.format(paths=paths, directory=str(tmp_path))], check=False)
    run = tmp_path / "runs" / "mine" / "1"
    wait_for(lambda: Progress.read(run / "loggers" / "wandb.json").status == "failed")
    (only,) = records(run)
    assert [r["exit"]["exit_code"] for r in only if r["type"] == "exit"] == [1]


def test_a_preempted_run_says_so(tmp_path: Path) -> None:
    run = Run(tmp_path).start("wandb", timeout=300.0, mode="offline", system_metrics=False)
    run.train(0).finish("preempted")
    (only,) = records(run.directory)
    assert [r["exit"]["exit_code"] for r in only if r["type"] == "exit"] == [1]
    assert any(r.get("summary", {}).get("update", {}).get("status") == "preempted" for r in only)


@pytest.mark.parametrize("share", [False, True])
def test_the_environment_is_told_only_if_the_experiment_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: bool
) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    subprocess.run(["git", "-C", tmp_path, "remote", "add", "origin", "https://host/our-remote.git"], check=True)
    who = ["-c", "user.name=x", "-c", "user.email=x@y"]
    subprocess.run(["git", "-C", tmp_path, *who, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    monkeypatch.chdir(tmp_path)
    run = Run(tmp_path)
    run.experiment = {"run": {"share_environment": share}}
    run.start("wandb", timeout=60.0, mode="offline").train(0).finish()
    (only,) = records(run.directory)
    told = json.dumps(only)
    files = [path.name for path in run.directory.rglob("wandb/offline-run-*/files/*")]
    facts = [socket.gethostname() in told, sys.executable in told, "our-remote" in told, "requirements.txt" in files]
    assert facts == [share] * 4


class Refusing(http.server.BaseHTTPRequestHandler):
    """Knows no key."""

    def do_POST(self) -> None:
        self.send_response(401)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def black_hole() -> Iterator[str]:
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def train(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], tuple[str, Path]]:
    """Runs with wandb pointed at a URL; gives what was printed, and the run's directory."""

    def run(url: str, options: str) -> tuple[str, Path]:
        for name, value in {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40, "no_proxy": "*", "NO_PROXY": "*"}.items():
            monkeypatch.setenv(name, value)
        more = f'\n[[loggers]]\nplugin = "wandb"\nsystem_metrics = false\n{options}'
        result = call("run", write_experiment(tmp_path / "x.toml", shards, more), "--runs-dir", tmp_path / "runs")
        assert result.code == 0, result.err
        path = only_run(tmp_path / "runs")
        assert set(losses(path)) == set(range(12))
        return result.out, path

    return run


def test_online_into_a_black_hole(train: Any, tmp_path: Path, black_hole: str) -> None:
    out, run = train(black_hole, 'mode = "online"\ninit_timeout = 1\ntimeout = 300\n')
    assert out.count("logger wandb") == 2, out  # what is wrong, and what to do
    assert f"log-sync tiny/{run.name} --to wandb" in out
    arguments = (f"tiny/{run.name}", "--to", "wandb", "--runs-dir", tmp_path / "runs")
    sent = call("log-sync", *arguments, "--set", "mode=offline")
    assert sent.code == 0, sent.err + sent.out
    assert series(history(run), "train/loss") == losses(run)


def test_auto_goes_offline_when_nobody_answers(train: Any, black_hole: str) -> None:
    out, run = train(black_hole, "init_timeout = 1\ntimeout = 300\n")
    assert f"offline, because {black_hole} does not answer" in out
    assert series(history(run), "train/loss") == losses(run)


def test_auto_goes_offline_when_the_server_does_not_accept_the_run(train: Any) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    out, run = train(f"http://127.0.0.1:{server.server_port}", "init_timeout = 60\ntimeout = 300\n")
    server.shutdown()
    server.server_close()
    assert "offline, because the server does not accept the run" in out
    assert series(history(run), "train/loss") == losses(run)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with serve() as server:
        for name, value in {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40, "NO_PROXY": "*"}.items():
            monkeypatch.setenv(name, value)
        yield server


def interrupted(tmp_path: Path, **options: Any) -> Run:
    """A run that is killed after step 7 and goes on from its checkpoint of step 4."""
    run = Run(tmp_path)
    run.start("wandb", timeout=300.0, system_metrics=False, **options).train(0, 1, 2, 3)
    size = run.logs.ledger_bytes()
    run.train(4, 5, 6, 7).finish("failed")
    rewind_ledger(run.directory / "metrics.jsonl", size, 4)
    run.start("wandb", timeout=300.0, start_step=4, system_metrics=False, **options)
    run.train(4, 5, 6, 7, 8, 9).finish()
    return run


def test_online_a_resumed_run_goes_on_in_the_same_run(server: WandbServer, tmp_path: Path) -> None:
    run = interrupted(tmp_path, mode="online")
    assert [row["step"] for row in server.rows("mine-1") if "train/loss" in row] == list(range(10))
    assert server.exits == {"mine-1": [1, 0]}
    assert any(f"{server.url}/me/nanochat/runs/mine-1" in line for line in run.said)


def upload(said: list[str], logs: Path) -> None:
    """What the last line says to type; wandb's own logs go to ``logs``."""
    (command,) = re.findall(r"wandb sync .*", said[-1])
    done = subprocess.run(
        f"{sys.executable} -m {command}", shell=True, capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "WANDB_DIR": str(logs)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_offline_a_resumed_run_is_uploaded_whole(server: WandbServer, tmp_path: Path) -> None:
    run = interrupted(tmp_path, mode="offline")
    assert not server.lines
    upload(run.said, tmp_path)
    assert [row["step"] for row in server.rows("mine-1") if "train/loss" in row] == list(range(10))


def test_a_server_that_goes_silent_in_the_middle(server: WandbServer, tmp_path: Path) -> None:
    run = Run(tmp_path).start("wandb", timeout=300.0, mode="online", system_metrics=False, finish_timeout=2.0)
    run.train(0, 1)
    wait_for(lambda: len(server.rows("mine-1")) == 2)
    server.silent.set()
    run.train(2, 3, 4)
    run.finish()
    assert len(server.rows("mine-1")) == 2
    assert "the upload did not finish in time" in run.said[-1]
    server.silent.clear()
    upload(run.said, tmp_path)
    assert [row["step"] for row in server.rows("mine-1")] == list(range(5))


def test_a_service_of_another_process_is_left_alone(
    train: Any, monkeypatch: pytest.MonkeyPatch, black_hole: str
) -> None:
    monkeypatch.setenv("WANDB_SERVICE", "3-1-unix-/nowhere/socket")
    _, run = train(black_hole, 'mode = "offline"\ntimeout = 300\n')
    assert series(history(run), "train/loss") == losses(run)


def test_the_entry_tells_how_to_install_its_library() -> None:
    entry = load_plugins("wandb")["logger"].get("wandb")
    assert entry is not None
    assert (entry.requires, entry.install) == (("wandb",), "pip install 'nanochat-core[wandb]'")
