"""Several runs on one machine at the same moment do not get into each other's way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed
from helpers.killing import Place, write_killed
from helpers.support import Result, assert_same_end, losses

from nanochat_core.runs.checkpoint import verify

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")


def together(file: Path, runs: Path, home: Path, *more: str) -> list[Result]:
    """Two runs of two ranks each, started at the same moment."""
    environment = {**os.environ, "NANOCHAT_HOME": str(home), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "nanochat_core", "run", str(file), "--runs-dir", str(runs), "--nproc", "2"]
    processes = [
        subprocess.Popen(
            [*arguments, *more], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        said = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [Result(process.returncode, *both) for process, both in zip(processes, said, strict=True)]


def test_runs_of_one_experiment_and_resumes_of_one_run(tmp_path: Path) -> None:
    """Two fresh runs share a home in which there is nothing yet: no tokenizer, no tokens. Then both go on with one."""
    file = write_killed(tmp_path, steps=12, asynchronous=False)
    place = Place(file, tmp_path)
    results = together(file, place.runs, place.home)
    assert [result.code for result in results] == [0, 0], [result.err for result in results]
    first, second = (path.parent for path in place.runs.glob("*/*/experiment.toml"))
    assert_same_end(first, second)
    assert len(losses(first)) == 12
    assert sum(result.out.count("building the tokenizer") for result in results) == 1
    assert place.leftovers() == set()

    newest = place.run()
    for checkpoint in sorted((newest / "checkpoints").iterdir())[1:]:
        shutil.rmtree(checkpoint)
    results = together(file, place.runs, place.home, "--resume")
    assert 0 in (result.code for result in results), [result.err for result in results]
    for result in results:  # on a busy machine the second may come when the first is done
        refused = result.code == 2 and f"{newest}: another process is training this run (process " in result.err
        assert refused or (result.code == 0 and ("resuming" in result.out or "nothing to do" in result.out))
    assert_same_end(first, second)
    assert all(verify(checkpoint) == "" for checkpoint in (newest / "checkpoints").iterdir())
    assert place.leftovers() == set()
