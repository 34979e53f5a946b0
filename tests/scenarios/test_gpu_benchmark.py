"""The GPU benchmark runs where there is no GPU, with tiny shapes; what can't run is a row of its report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu.py", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "NANOCHAT_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_smoke(tmp_path: Path) -> None:
    done = run("--smoke", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    trained, failed, attention, profile = rows
    assert trained["tokens/s"] > 0
    assert 0 < trained["mfu"] < 1
    assert trained["losses"][1] < trained["losses"][0]
    assert "flash3" in failed["error"] or "flash_attn_interface" in failed["error"]
    assert attention["full ms"] > 0
    assert attention["window ms"] > 0
    assert profile["kernels"][0][2] > 0
    assert sum(profile["groups"].values()) == pytest.approx(profile["busy ms"])
    report = (tmp_path / "report.md").read_text()
    assert failed["error"] in report
    assert f"{trained['tokens/s']:,.0f}" in report

    again = run("--smoke", "--out", tmp_path)  # goes on after the last result, which was the last of all
    assert again.returncode == 0
    assert json.loads((tmp_path / "report.json").read_text())["rows"] == rows


def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 2
    assert "there is no CUDA GPU" in done.stderr
