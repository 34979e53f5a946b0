"""Offline runs, read back record by record; and servers that can't be reached, or never answer."""

from __future__ import annotations

import http.server
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import ledger, losses, metrics, only_run, spawn, write_experiment

from nanochat_core.plugins import load_plugins

pytest.importorskip("wandb")


def records(run: Path) -> list[list[dict[str, Any]]]:
    """Records of every offline run in ``run``, oldest first."""
    found = []
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
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
        assert [r["summary"]["update"]["status"] for r in part if "status" in r.get("summary", {}).get("update", {})]
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
    assert [12, "samples/0"] in [row[:2] for row in texts] or any(row[0] == 12 for row in texts)
    whole = max((t for t in tables if "evaluator" in t["columns"]), key=lambda t: len(t["data"]))
    assert {row[0]: row[3] for row in whole["data"] if row[2] == "val/bpb"} == metrics(logged, "val/bpb")


def test_a_killed_run_is_not_left_in_progress(tmp_path: Path, shards: Path) -> None:
    file = write_experiment(tmp_path / "x.toml", shards, '\n[[loggers]]\nplugin = "wandb"\nmode = "offline"\n')
    command = [sys.executable, "-m", "nanochat_core", "run", str(file), "--runs-dir", str(tmp_path / "runs")]
    training = subprocess.Popen(
        [*command, "--set", "train.num_iterations=100000"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert training.stdout is not None
    for line in training.stdout:
        if "logger wandb: writes to" in line:
            break
    training.kill()
    training.wait()
    training.stdout.close()
    progress = only_run(tmp_path / "runs") / "loggers" / "wandb.json"
    deadline = time.monotonic() + 30
    while not progress.exists() or json.loads(progress.read_text())["status"] != "failed":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (only,) = records(only_run(tmp_path / "runs"))
    assert [r["exit"]["exit_code"] for r in only if r["type"] == "exit"] == [1]


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


def train(tmp_path: Path, shards: Path, url: str, options: str) -> tuple[str, float, Path]:
    """Run with wandb pointed at ``url``: what was printed, and how long it took."""
    more = f'\n[[loggers]]\nplugin = "wandb"\nsystem_metrics = false\n{options}'
    file = write_experiment(tmp_path / "x.toml", shards, more)
    environment = {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40, "no_proxy": "*", "NO_PROXY": "*"}
    started = time.monotonic()
    result = spawn("run", file, "--runs-dir", tmp_path / "runs", env=environment)
    assert result.code == 0, result.err
    run = only_run(tmp_path / "runs")
    assert set(losses(run)) == set(range(12))
    return result.out, time.monotonic() - started, run


def test_online_into_a_black_hole(tmp_path: Path, shards: Path, black_hole: str) -> None:
    out, seconds, run = train(tmp_path, shards, black_hole, 'mode = "online"\ninit_timeout = 1\ntimeout = 5\n')
    assert out.count("logger wandb") == 2, out  # what is wrong, and what to do
    assert f"log-sync tiny/{run.name} --to wandb" in out
    assert seconds < 60
    arguments = (f"tiny/{run.name}", "--to", "wandb", "--runs-dir", tmp_path / "runs")
    sent = spawn("log-sync", *arguments, "--set", "mode=offline")
    assert sent.code == 0, sent.err + sent.out
    assert series(history(run), "train/loss") == losses(run)


def test_auto_goes_offline_when_nobody_answers(tmp_path: Path, shards: Path, black_hole: str) -> None:
    out, _, run = train(tmp_path, shards, black_hole, "init_timeout = 1\n")
    assert f"offline, because {black_hole} does not answer" in out
    assert series(history(run), "train/loss") == losses(run)


def test_auto_goes_offline_when_the_server_does_not_accept_the_run(tmp_path: Path, shards: Path) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    out, _, run = train(tmp_path, shards, f"http://127.0.0.1:{server.server_port}", "init_timeout = 5\n")
    server.shutdown()
    assert "offline, because the server does not accept the run" in out
    assert series(history(run), "train/loss") == losses(run)


def test_the_entry_tells_how_to_install_its_library() -> None:
    entry = load_plugins("wandb")["logger"].get("wandb")
    assert entry is not None
    assert (entry.requires, entry.install) == (("wandb",), "pip install -e '.[wandb]'")
