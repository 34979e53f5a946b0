"""Credentials in the address of the data are in no file of the run, and the run is resumed all the same."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.hub_server import HubServer, serve
from helpers.support import call, only_run

SECRET = "sEcReT4711"


@pytest.fixture
def server(shards: Path) -> Iterator[HubServer]:
    with serve(shards) as server:
        yield server


def test_credentials_are_not_kept(
    tiny: Path, server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path / "home"))
    urls = [f"{server.url}/plain/shard_0000{i}.parquet?b=1&token={SECRET}" for i in (0, 1)]
    urls[0] = urls[0].replace("://", f"://user:{SECRET}@")
    settings = [f"data.path={json.dumps(urls)}", "loggers.csv.plugin=csv", "train.num_iterations=2"]
    command = ["run", tiny, "--runs-dir", tmp_path / "runs", *(word for text in settings for word in ("--set", text))]
    monkeypatch.setattr("sys.argv", list(map(str, command)))
    result = call(*command)
    assert result.code == 0, result.err
    longer = call(*command, "--set", "train.num_iterations=3", "--resume")
    assert longer.code == 0, longer.err
    text = (only_run(tmp_path / "runs") / "experiment.toml").read_text()
    assert "?b=1&token=***" in text
    assert "://***@127.0.0.1" in text
    evaluated = call("eval", "tiny", "--runs-dir", tmp_path / "runs", "--evaluator", "bpb")
    assert evaluated.code == 1
    assert "the credentials in this address are not kept in a run; give the whole address" in evaluated.out
    shown = call("show", *command[1:2], *command[4:])
    for said in (result, longer, evaluated, shown):
        assert SECRET not in said.out + said.err
    kept = [Path(base) / name for base, _, names in os.walk(tmp_path) for name in names]
    assert len(kept) > 10
    assert [path for path in kept if SECRET.encode() in path.read_bytes()] == []
