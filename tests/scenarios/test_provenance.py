"""Provenance tells the truth: every value of a run, fresh and resumed, with where it came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.support import call, only_run


def _provenance(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "provenance.json").read_text(encoding="utf-8"))
    return content


def _auto(tiny: Path) -> Path:
    """The experiment with "auto" where a resumed run keeps what it became: one written in the file, one left out."""
    text = tiny.read_text(encoding="utf-8")
    assert "device_batch_size = 4\n" in text
    assert "compile = false\n" in text
    text = text.replace("device_batch_size = 4\n", 'device_batch_size = "auto"\n').replace("compile = false\n", "")
    tiny.write_text(text, encoding="utf-8")
    return tiny


def test_a_resumed_run_names_what_it_kept_and_nothing_else_changes(tiny: Path, tmp_path: Path) -> None:
    file, runs = _auto(tiny), tmp_path / "runs"
    line = file.read_text(encoding="utf-8").splitlines().index('device_batch_size = "auto"') + 1
    assert call("run", file, "--runs-dir", runs, "--set", "train.num_iterations=8").code == 0
    run = only_run(runs)
    fresh = _provenance(run)
    assert fresh["origins"]["train.compile"].startswith("auto: ")
    assert fresh["origins"]["train.device_batch_size"].endswith(f"[{file}:{line}]")
    resumed = call("run", file, "--runs-dir", runs, "--resume", "--set", "train.num_iterations=12")
    assert resumed.code == 0, resumed.err
    now = _provenance(run)
    expected = fresh["origins"] | {
        "train.compile": f"kept from {run}",
        "train.device_batch_size": f"kept from {run} [{file}:{line}]",
        "train.num_iterations": "--set train.num_iterations=12",
    }
    assert now["origins"] == expected
    for key in ("compile", "device_batch_size", "accumulation_steps"):
        assert now["plan"][key] == fresh["plan"][key]
    assert not [text for text in now["origins"].values() if text.startswith("--set") and "num_iterations" not in text]


def test_an_option_that_is_given_on_resume_is_not_kept(tiny: Path, tmp_path: Path) -> None:
    file, runs = _auto(tiny), tmp_path / "runs"
    assert call("run", file, "--runs-dir", runs, "--set", "train.num_iterations=4").code == 0
    again = ("--resume", "--set", "train.num_iterations=8", "--set", "train.device_batch_size=2")
    assert call("run", file, "--runs-dir", runs, *again).code == 0
    provenance = _provenance(only_run(runs))
    assert provenance["origins"]["train.device_batch_size"] == "--set train.device_batch_size=2"
    assert provenance["plan"]["device_batch_size"] == 2


def test_show_of_the_file_that_a_resumed_run_wrote_gives_each_value(tiny: Path, tmp_path: Path) -> None:
    file, runs = _auto(tiny), tmp_path / "runs"
    assert call("run", file, "--runs-dir", runs, "--set", "train.num_iterations=4").code == 0
    assert call("run", file, "--runs-dir", runs, "--resume", "--set", "train.num_iterations=8").code == 0
    run = only_run(runs)
    shown = call("show", run / "experiment.toml")
    assert shown.code == 0, shown.err
    rows = [line.partition("  # ") for line in shown.out.splitlines() if line.strip()]
    origins = {left.split(" ")[0]: right for left, _, right in rows}
    assert origins.keys() == _provenance(run)["origins"].keys()
    for left, _, origin in rows:
        if "(unset)" in left:
            assert origin == "default", left
        else:
            assert origin.startswith((f"{run / 'experiment.toml'}:", "auto: ")), (left, origin)
    values = {left.split(" = ")[0].strip(): left.partition(" = ")[2].strip() for left, _, _ in rows}
    plan = _provenance(run)["plan"]
    assert values["train.device_batch_size"] == str(plan["device_batch_size"])
    assert values["train.compile"] == str(plan["compile"]).lower()
