"""The experiment files that ship: each loads again to itself, the recipes give the numbers they should, every technique
of the speedrun has an ablation, and every ablation trains."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.support import ROOT, call, only_run

from nanochat_core.config.load import load
from nanochat_core.config.tables import dump
from nanochat_core.planning.planner import make_plan
from nanochat_core.plugins.discovery import load_plugins

PLUGINS = load_plugins()
EXPERIMENTS = ROOT / "experiments"
SHIPPED = sorted(p.relative_to(EXPERIMENTS).with_suffix("").as_posix() for p in EXPERIMENTS.rglob("*.toml"))
ABLATIONS = [name for name in SHIPPED if name.startswith("ablations/")]


@pytest.mark.parametrize("name", [n for n in SHIPPED if n != "decay"])  # of a plugin that is not installed
def test_a_shipped_experiment_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    loaded = load(EXPERIMENTS / f"{name}.toml", (), PLUGINS)
    copy = tmp_path / "copy.toml"
    copy.write_text(dump(loaded.experiment), encoding="utf-8")
    assert load(copy, (), PLUGINS).experiment == loaded.experiment


@pytest.mark.parametrize(
    ("overrides", "millions", "log_batch", "steps", "decay"),
    [
        ((), 730, 20, 5568, 0.0597),  # as written, ratio 8
        (("train.target_param_data_ratio=12",), 730, 20, 8352, 0.0597),
        (("model.depth=20", "train.target_param_data_ratio=12"), 435, 20, 4980, 0.100),
        (("model.depth=12", "train.target_param_data_ratio=12"), 110, 19, 2520, 0.28),
        (("model.depth=8", "train.num_iterations=100"), 42, 18, 100, 0.52),
        (("model.depth=4", "train.num_iterations=100"), 12, 18, 100, 1.89),
    ],
)
def test_the_speedrun_gives_the_numbers_of_its_recipe(
    overrides: tuple[str, ...], millions: int, log_batch: int, steps: int, decay: float
) -> None:
    loaded = load(EXPERIMENTS / "speedrun.toml", ["model.fp8=false", "train.dtype=bfloat16", *overrides], PLUGINS)
    planned = make_plan(loaded, 1, torch.device("cpu"))
    plan, optimizer = planned.plan, planned.experiment.optimizer.config
    assert round(plan.scaling_parameters / 1e6) == millions
    assert plan.total_batch_size == 2**log_batch
    assert plan.num_iterations == steps
    assert optimizer.lr_scale == pytest.approx((2**log_batch / 2**19) ** 0.5)
    assert optimizer.matrix_weight_decay * optimizer.matrix_weight_decay_scale == pytest.approx(decay, rel=0.01)
    for key in ("lr_scale", "matrix_weight_decay_scale"):
        assert planned.origins[f"optimizer.{key}"].text.startswith("auto: ")


def _options(table: str) -> dict[str, Any]:
    return tomllib.loads((EXPERIMENTS / "speedrun.toml").read_text())[table]


def test_every_technique_of_the_speedrun_has_an_ablation() -> None:
    sizes = {"plugin", "depth", "matrix_lr", "scalar_lr", "residual_lr", "smear_lr", "momentum_start"}
    base = load(EXPERIMENTS / "ablations/base.toml", (), PLUGINS).experiment
    changed = set()
    for name in ABLATIONS:
        arm = load(EXPERIMENTS / f"{name}.toml", (), PLUGINS).experiment
        for table in ("model", "optimizer"):
            ours, theirs = getattr(base, table), getattr(arm, table)
            if ours.plugin == theirs.plugin and name != "ablations/classic":
                keys = _options(table)
                changed |= {key for key in keys if getattr(ours.config, key, 0) != getattr(theirs.config, key, 0)}
    assert {*_options("model"), *_options("optimizer")} - sizes == changed - sizes


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_trains(name: str, shards: Path, tmp_path: Path) -> None:
    small = (
        "tokenizer.plugin=bytes", "data.plugin=parquet", f"data.path={shards}", "train.max_seq_len=32", "model.depth=2",
        "train.total_batch_size=256", "train.device_batch_size=4", "train.num_iterations=2", "train.compile=false",
        "evaluators.bpb.eval_tokens=256",
    )  # fmt: skip
    settings = [word for setting in small for word in ("--set", setting)]
    result = call("run", EXPERIMENTS / f"{name}.toml", "--runs-dir", tmp_path, *settings)
    if name == "ablations/fp8":
        assert result.code == 2
        assert "fp8.toml:8: model.fp8: it needs a Hopper or newer GPU" in result.err
        return
    assert result.code == 0, result.err
    assert (only_run(tmp_path) / "checkpoints" / "step_000002").is_dir()
