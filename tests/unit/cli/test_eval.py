"""``nanochat eval`` on a small trained run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from helpers.core_bundle import write_bundle
from helpers.ranks import call_on_ranks
from helpers.support import Trained, call, write_shards

from nanochat_core.cli import main


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def runs(trained: Trained, tmp_path: Path) -> Path:
    """A copy of the trained run that a test may add to."""
    shutil.copytree(trained.runs, tmp_path / "runs")
    return tmp_path / "runs"


def run_of(runs: Path) -> Path:
    (path,) = runs.glob("tiny/*")
    return path


def test_core_on_a_run_that_never_heard_of_it(runs, bundle):
    result = call(
        "eval", "tiny", "--runs-dir", runs, "--evaluator", "core", "--set", f"evaluators.core.bundle={bundle}"
    )
    assert result.code == 0, result.err
    assert "| arc_easy | 16 |" in result.out
    assert "core/partial_mean: " in result.out
    assert "18 of CORE's 22 tasks are not in the bundle" in result.out
    path = run_of(runs) / "evaluations" / "core_000012"
    assert sorted(p.name for p in path.iterdir()) == ["core.csv", "evaluation.json", "examples.parquet", "table.md"]
    table = pq.read_table(path / "examples.parquet")
    assert {"task", "example", "value", "scores", "chosen", "gold"} <= set(table.column_names)
    facts = json.loads((path / "evaluation.json").read_text())
    assert facts["step"] == 12
    assert facts["facts"]["baselines"] == "unknown"
    assert [p.name for p in path.parent.iterdir()] == ["core_000012"]


def test_evaluators_of_the_experiment_by_default_as_in_the_run(runs, trained):
    result = call("eval", "tiny", "--runs-dir", runs)
    assert result.code == 0, result.err
    facts = json.loads((run_of(runs) / "evaluations" / "bpb_000012" / "evaluation.json").read_text())
    ledger = [json.loads(line) for line in (trained.path / "metrics.jsonl").read_text().splitlines()]
    (recorded,) = [r["val/bpb"] for r in ledger if "val/bpb" in r and r["step"] == 12]
    assert facts["metrics"]["val/bpb"] == pytest.approx(recorded, rel=1e-6)
    assert "samples/0: one, " in result.out


def test_an_older_checkpoint_and_a_comparison(runs, bundle):
    checkpoint = run_of(runs) / "checkpoints" / "step_000004"
    core = ["--evaluator", "core", "--set", f"evaluators.core.bundle={bundle}", "--runs-dir", runs]
    assert call("eval", checkpoint, *core).code == 0
    evaluations = run_of(runs) / "evaluations"
    assert (evaluations / "core_000004").is_dir()
    assert call("eval", "tiny", *core).code == 0
    compared = call("eval", "--compare", evaluations / "core_000004", "tiny", "--runs-dir", runs)
    assert compared.code == 0, compared.err
    assert "| task | examples | A | B | B - A | 95% | better | worse | p |" in compared.out
    assert "| winograd | 9 |" in compared.out
    assert "| mean, centered | 46 |" in compared.out
    same = call("eval", "--compare", "tiny", evaluations / "core_000012", "--runs-dir", runs).out
    assert "| arc_easy | 16 |" in same
    assert "+0.0000 | +0.0000 to +0.0000 | 0 | 0 | 1 |" in same


def test_a_comparison_names_other_settings(runs, bundle):
    core = ["--evaluator", "core", "--set", f"evaluators.core.bundle={bundle}", "--runs-dir", runs]
    assert call("eval", run_of(runs) / "checkpoints" / "step_000004", *core).code == 0
    assert call("eval", "tiny", *core, "--set", "evaluators.core.max_per_task=5").code == 0
    found = call("eval", "--compare", run_of(runs) / "evaluations" / "core_000004", "tiny", "--runs-dir", runs).out
    assert "warning: max_per_task is 500 in A and 5 in B" in found
    assert "examples are in only one of the two" in found


def test_results_on_other_data_are_not_compared(runs, bundle, tmp_path):
    (tmp_path / "other").mkdir()
    other = write_shards(tmp_path / "other", val=9)
    evaluations = run_of(runs) / "evaluations"
    both = ["--evaluator", "bpb", "--evaluator", "core", "--set", f"evaluators.core.bundle={bundle}"]
    assert call("eval", run_of(runs) / "checkpoints" / "step_000004", *both, "--runs-dir", runs).code == 0
    assert call("eval", "tiny", *both, "--set", f"data.path={other}", "--runs-dir", runs).code == 0
    facts = [json.loads((evaluations / f"bpb_{step}" / "evaluation.json").read_text()) for step in ("000004", "000012")]
    assert [list(found["data"]) for found in facts] == [["val"], ["val"]]
    provenance = json.loads((run_of(runs) / "provenance.json").read_text())
    assert facts[0]["data"]["val"] == provenance["fingerprints"]["val"] != facts[1]["data"]["val"]

    shutil.move(evaluations / "bpb_000004", tmp_path)
    pair = ["--compare", tmp_path / "bpb_000004", "tiny", "--runs-dir", runs]
    refused = call("eval", *pair)
    assert refused.code == 2
    assert "bpb: A and B were measured on different val data" in refused.err
    assert "val/bpb" not in refused.out
    allowed = call("eval", *pair, "--allow-other-data")
    assert allowed.code == 0, allowed.err
    assert "warning: the two were measured on different val data" in allowed.out
    core = call("eval", "--compare", evaluations / "core_000004", evaluations / "core_000012", "--runs-dir", runs)
    assert core.code == 0, core.err  # it reads none of them


@pytest.mark.xdist_group("ranks")
def test_two_processes_find_the_same(runs, bundle):
    options = ["--runs-dir", runs, "--evaluator", "core", "--set", f"evaluators.core.bundle={bundle}"]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert call("eval", "tiny", *options).code == 0
    finally:
        torch.set_num_threads(before)
    path = run_of(runs) / "evaluations" / "core_000012"
    alone = pq.read_table(path / "examples.parquet")
    result = call_on_ranks(2, "eval", "tiny", *options)
    assert result.code == 0, result.err
    assert pq.read_table(path / "examples.parquet") == alone
    assert json.loads((path / "evaluation.json").read_text())["ranks"] == 2


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "give either one model"),
    (["tiny", "--compare", "a", "b"], "give either one model"),
    (["tny"], 'did you mean "tiny"'),
    (["tiny", "--evaluator", "cor"], 'did you mean "core"'),
    (["tiny", "--set", "model.depth=3"], "can't be changed for an evaluation"),
    (["tiny", "--evaluator", "core", "--set", "evaluators.core.bundle=nowhere"], "neither a directory nor a zip"),
    (["--compare", "tiny", "tiny"], "has not been evaluated yet"),
])  # fmt: skip
def test_mistakes_are_named(runs, arguments, message):
    result = call("eval", *arguments, "--runs-dir", runs)
    assert result.code in (1, 2)
    assert message in result.err + result.out


def test_a_damaged_checkpoint_is_refused(runs):
    checkpoint = run_of(runs) / "checkpoints" / "step_000004"
    (checkpoint / "model.safetensors").write_bytes(b"nothing")
    result = call("eval", checkpoint, "--runs-dir", runs)
    assert result.code == 2
    assert "model.safetensors" in result.err


def test_help_mentions_every_kind(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    assert "PLUGIN:PATH" in capsys.readouterr().out
