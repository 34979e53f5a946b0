"""``device_batch_size = "auto"``: the search, what a plan makes of it, and that a resumed run keeps it."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest
import torch
from helpers.support import call, losses, only_run

from nanochat_core.config.load import load
from nanochat_core.distributed.world import World
from nanochat_core.hardware.devices import GIB, KNOWN_DEVICES, DeviceSpec
from nanochat_core.planning.banner import format_plan
from nanochat_core.planning.batch_size import divisors, largest_that_fits, sizes
from nanochat_core.planning.out_of_memory import OutOfMemory
from nanochat_core.planning.plan import Planned
from nanochat_core.planning.planner import make_plan
from nanochat_core.planning.probe import settle_batch_size
from nanochat_core.plugins.discovery import load_plugins

AUTO = "train.device_batch_size=auto"
CPU = torch.device("cpu")


def plan(file: Path, device: torch.device | DeviceSpec, *overrides: str, ranks: int = 1) -> Planned:
    return make_plan(load(file, (AUTO, *overrides), load_plugins()), ranks, device)


def test_divisors_rise() -> None:
    assert divisors(1) == [1]
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]


@pytest.mark.parametrize("start", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("most", [0, 1, 3, 4, 100])
def test_the_largest_is_found_from_anywhere(start: int, most: int) -> None:
    asked: list[int] = []

    def fits(rows: int) -> bool:
        asked.append(rows)
        return rows <= most

    found = largest_that_fits([1, 2, 4, 8, 16], start, fits)
    assert found == {0: None, 1: 1, 3: 2, 4: 4, 100: 16}[most]
    assert len(asked) == len(set(asked))


def test_a_good_estimate_saves_probes() -> None:
    asked: list[int] = []
    assert largest_that_fits([1, 2, 4, 8, 16], 4, lambda rows: asked.append(rows) or rows <= 4) == 4  # type: ignore[func-returns-value]
    assert asked == [4, 8]


def test_a_cpu_gets_no_more_than_helps() -> None:
    cpu = DeviceSpec("cpu", "CPU", 10**15)
    assert sizes(256, 2048, cpu)[-1] == 8
    assert sizes(256, 2**20, cpu) == [1]
    assert sizes(256, 2048, KNOWN_DEVICES["h100"])[-1] == 256


def test_a_plan_takes_the_largest_that_fits(tiny: Path) -> None:
    large = plan(tiny, CPU)
    assert (large.plan.device_batch_size, large.plan.accumulation_steps) == (8, 1)
    assert large.plan.total_batch_size == 256
    assert large.experiment.train.device_batch_size == 8
    assert "the largest of 1, 2, 4, 8" in large.origins["train.device_batch_size"].text
    need = [sum(memory.values()) for memory in large.plan.choices.values()]
    assert need == sorted(need)
    small = DeviceSpec("cuda", "small", int(need[1] / 0.9) + 1, (8, 0))
    float32 = plan(tiny, small)
    fitting = [rows for rows, memory in float32.plan.choices.items() if sum(memory.values()) <= float32.plan.room]
    assert float32.plan.device_batch_size == fitting[-1] < 8


def test_what_cannot_fit_is_said(tiny: Path) -> None:
    planned = plan(tiny, DeviceSpec("cuda", "tiny", 1000, (8, 0)))
    assert planned.plan.device_batch_size == 1
    assert "the smallest, although" in planned.origins["train.device_batch_size"].text
    assert "more than the 0 MiB available for training" in format_plan(planned)


def test_ranks_divide_the_rows(tiny: Path) -> None:
    assert plan(tiny, CPU, ranks=4).plan.device_batch_size == 2


def test_probing_corrects_the_estimate_and_nothing_else(tiny: Path) -> None:
    planned, world = plan(tiny, CPU), World(0, 1, CPU)
    assert settle_batch_size(planned, world) is planned  # on a CPU the estimate stands
    settled = settle_batch_size(planned, world, fits=lambda rows: rows <= 2)
    assert (settled.plan.device_batch_size, settled.plan.accumulation_steps) == (2, 4)
    assert settled.experiment.train == attrs.evolve(planned.experiment.train, device_batch_size=2)
    assert settled.plan.total_batch_size == planned.plan.total_batch_size
    assert settled.plan.memory == planned.plan.choices[2]
    assert settled.origins["train.device_batch_size"].text.endswith("tested on 1 devices: 2")
    with pytest.raises(OutOfMemory, match=r"out of memory while probing"):
        settle_batch_size(planned, world, fits=lambda rows: False)


def test_a_run_records_it_and_a_resumed_one_keeps_it(tiny: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    settings = ("--runs-dir", runs, "--set", AUTO)
    assert call("run", tiny, *settings, "--set", "train.num_iterations=4").code == 0
    run = only_run(runs)
    assert "device_batch_size = 8" in (run / "experiment.toml").read_text()
    origins = json.loads((run / "provenance.json").read_text())
    assert "the largest of 1, 2, 4, 8" in json.dumps(origins)
    resumed = call("run", tiny, *settings, "--resume")
    assert resumed.code == 0, resumed.err
    assert "changed on resume" not in resumed.out
    assert len(losses(run)) == 12


def test_planning_for_a_gpu_that_is_not_here(tiny: Path) -> None:
    overrides = ("train.dtype=auto", "train.compile=auto", "model.window_pattern='SL'", "model.depth=2")
    planned = make_plan(load(tiny, overrides, load_plugins()), 2, KNOWN_DEVICES["h100"])
    assert planned.plan.device == "H100"
    assert (planned.plan.dtype, planned.plan.compile) == ("bfloat16", True)
    assert planned.plan.room < 79 * GIB
    assert "activations" in planned.plan.memory
    old = make_plan(load(tiny, ("model.fp8=true",), load_plugins()), 2, KNOWN_DEVICES["a100"])
    assert any("Hopper" in str(problem) for problem in old.problems)
    assert not make_plan(load(tiny, ("model.fp8=true",), load_plugins()), 2, KNOWN_DEVICES["h100"]).problems


def test_a_micro_batch_that_fits_nowhere_is_refused(tiny: Path) -> None:
    overrides = ("train.max_seq_len=16777216", "train.total_batch_size=1099511627776", "train.device_batch_size=65536")
    result = call("plan", tiny, *(part for text in overrides for part in ("--set", text)))
    assert result.code == 2
    assert "train.device_batch_size: 65536 sequences of 16777216 tokens fit on no device: lower it to 1" in result.err
