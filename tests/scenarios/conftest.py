"""Runs that several scenarios start from."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.support import only_run, spawn, write_experiment


@pytest.fixture(scope="session")
def on_two_ranks(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An experiment of 100 quick steps, and its run on two ranks by our launcher, which nothing happened to."""
    directory = tmp_path_factory.mktemp("on_two_ranks")
    file = write_experiment(directory / "tiny.toml", shards)
    text = file.read_text().replace("num_iterations = 12", "num_iterations = 100")
    # In bfloat16 a product's rounding depends on how many matrices a rank multiplies at once, so not with muon.
    text = text.replace("every = 4\neval_tokens", "every = 10\neval_tokens").replace('"muon_adamw"', '"adamw"')
    file.write_text(text)
    done = spawn("run", file, "--runs-dir", directory / "runs", "--nproc", 2, env={"OMP_NUM_THREADS": "1"})
    assert done.code == 0, done.err
    assert done.out.count("step 00007/00100") == 1
    assert "accumulation steps    1" in done.out
    return file, only_run(directory / "runs")
