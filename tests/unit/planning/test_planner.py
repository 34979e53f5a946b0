"""The plan: every "auto" and horizon becomes a number, with its formula; what does not divide names what would."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers.support import ROOT, Site

from nanochat_core import ConfigError
from nanochat_core.config.load import load
from nanochat_core.planning.banner import format_plan
from nanochat_core.planning.plan import Planned
from nanochat_core.planning.planner import make_plan
from nanochat_core.plugins.discovery import load_plugins

PLUGINS = load_plugins()
CPU = torch.device("cpu")


def plan(file: Path, *overrides: str, world_size: int = 1) -> Planned:
    return make_plan(load(file, overrides, PLUGINS), world_size, CPU)


def classic(depth: int, *overrides: str, world_size: int = 1) -> Planned:
    return plan(ROOT / "experiments" / f"d{depth}.toml", "train.compile=false", *overrides, world_size=world_size)


# ------------------------------------------------------------------------------------------------------- the numbers


def test_classic_d20_with_the_original_vocabulary() -> None:
    found = classic(20, "tokenizer.vocab_size=65536").plan
    assert found.parameter_counts == {
        "embedding": 65536 * 1280,
        "head": 65536 * 1280,
        "matrix": 20 * 12 * 1280**2,
        "total": 560988160,
    }
    assert found.num_iterations == 560988160 * 20 // 524288 == 21400
    assert found.total_tokens == 21400 * 524288
    assert found.flops_per_token == 6 * (20 * 12 * 1280**2 + 65536 * 1280) + 20 * 12 * 1280 * 2048
    assert found.accumulation_steps == 8
    assert found.rows_per_step == 256


def test_ranks_share_the_accumulation() -> None:
    assert classic(20, world_size=8).plan.accumulation_steps == 1
    assert classic(20, world_size=8).plan.num_iterations == classic(20).plan.num_iterations


SCALED = """
import torch
from nanochat_core import Model

@attrs.frozen
class Config:
    scale: int = option(1, "rows of the matrix, a thousand each")

class Scaled(Model):
    def __init__(self, config, context):
        super().__init__()
        self.vocab_size, self.hidden_size = context.vocab_size, 10
        self.matrix = torch.nn.Parameter(torch.zeros(config.scale * 100, 10))
        self.head = torch.nn.Parameter(torch.zeros(100, 10))
        self.extra = torch.nn.Parameter(torch.zeros(7))
    def hidden(self, ids_BT, cache=None): raise NotImplementedError
    def logits(self, hidden_ND): raise NotImplementedError
    def parameter_roles(self): return {"matrix": "matrix", "head": "head", "extra": "scalar"}
    def reference_counts(self): return {"matrix": 7000, "head": 1000, "scalar": 7, "total": 8007}
    def describe(self): return {"layers": 77}

@hookimpl
def nanochat_register_models(registry):
    registry.add("scaled", config=Config, factory="made_up.plugin:Scaled")
"""


@pytest.mark.parametrize(
    ("scale", "log_batch"),
    [
        (7, 19),  # as large as the reference: 2^19
        (63, 20),  # 8 times: 19 + 0.383 x 3 = 20.15
        (511, 21),  # 64 times: 21.30
        (1, 18),  # a quarter: 18.23
    ],
)
def test_auto_batch_follows_the_formula(site: Site, tiny: Path, scale: int, log_batch: int) -> None:
    site.add("made-up", SCALED)
    settings = (f"model={{plugin='scaled', scale={scale}}}", "train.scaling_parameters=matrix_and_head")
    planned = make_plan(load(tiny, [*settings, "train.total_batch_size=auto"], load_plugins()), 1, CPU)
    assert planned.plan.scaling_parameters == (scale + 1) * 1000
    assert planned.plan.total_batch_size == 2**log_batch
    assert planned.experiment.train.total_batch_size == 2**log_batch
    origin = planned.origins["train.total_batch_size"].text
    assert origin.startswith("auto: 2^19 (D / D12)^0.383")
    assert origin.endswith("[--set train.total_batch_size=auto]")
    assert "activations" not in planned.plan.memory  # it can't be run on the meta device
    assert "activations unknown" in format_plan(planned)
    assert re.search(r"layers +77", format_plan(planned))


@pytest.mark.parametrize(
    ("depth", "millions", "log_batch", "steps"), [(12, 110, 19, 2520), (20, 435, 20, 4980), (24, 730, 20, 8352)]
)
def test_auto_batch_by_formula(depth: int, millions: int, log_batch: int, steps: int) -> None:
    planned = classic(
        12,
        f"model.depth={depth}",
        "train.total_batch_size=auto",
        "train.scaling_parameters=matrix_and_head",
        "train.target_param_data_ratio=12",
    )
    found = planned.plan
    assert round(found.scaling_parameters / 1e6) == millions
    assert found.total_batch_size == 2**log_batch
    assert found.num_iterations == steps


def test_auto_batch_counts_all_parameters_in_the_classic_recipe() -> None:
    """D / D12 = 477,102,080 / 135,266,304 = 3.53, and 2^19 x 3.53^0.383 = 2^19.70."""
    assert classic(20, "train.total_batch_size=auto").plan.total_batch_size == 2**20


# ------------------------------------------------------------------------------------------------------- the horizon


def test_iterations_win_as_given(tiny: Path) -> None:
    assert plan(tiny).plan.num_iterations == 12
    assert plan(tiny).plan.horizon == "num_iterations"


def test_flops_are_rounded(tiny: Path) -> None:
    step = plan(tiny).plan.flops_per_token * 256
    assert plan(tiny, f"train.target_flops={2.6 * step}").plan.num_iterations == 3
    assert plan(tiny, f"train.target_flops={2.4 * step}").plan.num_iterations == 2


def test_a_ratio_is_floored(tiny: Path) -> None:
    total = plan(tiny).plan.parameter_counts["total"]
    ratio = 3.9 * 256 / total
    found = plan(tiny, f"train.target_param_data_ratio={ratio}").plan
    assert found.num_iterations == 3
    assert f"{total:,} parameters" in found.horizon


@pytest.mark.parametrize("horizon", ["target_flops=1.0", "target_param_data_ratio=0.001"])
def test_less_than_a_step_is_refused(tiny: Path, horizon: str) -> None:
    with pytest.raises(ConfigError, match=rf"--set train\.{horizon}: train\..*less than one step.*increase it"):
        plan(tiny, f"train.{horizon}")


@pytest.mark.parametrize("horizon", ["target_flops=inf", "target_param_data_ratio=inf"])
def test_without_an_end_is_refused(tiny: Path, horizon: str) -> None:
    with pytest.raises(ConfigError, match=rf"train\.{horizon.partition('=')[0]}"):
        plan(tiny, f"train.{horizon}")


# ------------------------------------------------------------------------------------------------ what does not divide


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        (["train.device_batch_size=3"], 1),
        (["train.device_batch_size=16"], 1),
        (["train.device_batch_size=3", "train.total_batch_size=512"], 2),
        (["train.total_batch_size=300"], 1),
        (["train.total_batch_size=20"], 1),
        (["train.total_batch_size=288"], 2),
        (["train.total_batch_size=96", "train.device_batch_size=2"], 1),
        (["train.total_batch_size=7168", "train.device_batch_size=30"], 1),
    ],
)
def test_every_value_that_is_named_would_work(tiny: Path, overrides: list[str], world_size: int) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(tiny, *overrides, world_size=world_size)
    message = str(caught.value)
    assert message.startswith(("--set train.", f"{tiny}:"))
    remedies = message.partition("; ")[2]
    rows = [int(n) for n in re.findall(r"\d+", remedies.partition("would work")[0])] if "would work" in remedies else []
    totals = [int(n) for n in re.findall(r"\d+", remedies.partition("would work")[2] or remedies)]
    assert rows or totals
    for size in rows:
        plan(tiny, *overrides, f"train.device_batch_size={size}", world_size=world_size)
    for total in totals:  # of the sizes in "use A or B" only the rows divide, so take the smallest micro-batch
        more = [f"train.total_batch_size={total}", *([] if rows else ["train.device_batch_size=1"])]
        plan(tiny, *overrides, *more, world_size=world_size)


def test_what_does_not_divide_names_file_and_line(tiny: Path) -> None:
    tiny.write_text(tiny.read_text().replace("device_batch_size = 4", "device_batch_size = 3"))
    line = tiny.read_text().splitlines().index("device_batch_size = 3") + 1
    with pytest.raises(ConfigError, match=rf"tiny\.toml:{line}: train\.device_batch_size: .* 1, 2, 4 would work"):
        plan(tiny)


# ------------------------------------------------------------------------------------------------------------ the rest


def test_a_vocabulary_that_is_too_small_names_its_line(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"--set model\.vocab_size=100: model\.vocab_size: .*265.*auto"):
        plan(tiny, "model.vocab_size=100")


def test_autos_become_values_with_a_reason(tiny: Path) -> None:
    planned = plan(tiny, "train.dtype=auto", "train.compile=auto")
    assert planned.experiment.train.dtype in ("float32", "bfloat16")
    assert planned.experiment.train.dtype == planned.plan.dtype
    assert planned.experiment.train.compile is False
    assert planned.origins["train.dtype"].text.startswith("auto: this CPU ")
    assert planned.origins["train.dtype"].text.endswith("[--set train.dtype=auto]")
    assert planned.origins["train.compile"].text.startswith("auto: ")


def test_explicit_values_stay(tiny: Path) -> None:
    planned = plan(tiny, "train.dtype=bfloat16", "train.compile=true")
    assert (planned.plan.dtype, planned.plan.compile) == ("bfloat16", True)
    assert planned.origins["train.dtype"].text == "--set train.dtype=bfloat16"


def test_memory_is_estimated_from_parts(tiny: Path) -> None:
    memory = plan(tiny).plan.memory
    total = plan(tiny).plan.parameter_counts["total"]
    assert memory["parameters"] >= 4 * total  # float32; the padded head has some more
    assert 4 * total <= memory["gradients"] < memory["parameters"]  # which has the buffers too
    assert memory["optimizer state"] > 0


def test_activations_grow_with_the_micro_batch(tiny: Path) -> None:
    longer = ("train.max_seq_len=128", "train.total_batch_size=4096")
    small, large = (plan(tiny, *longer, f"train.device_batch_size={b}").plan.memory["activations"] for b in (8, 16))
    assert 1.8 < large / small <= 2  # the head's gradient and its scaled copy do not grow


def test_the_banner_says_it_all(tiny: Path) -> None:
    banner = re.sub(r" {2,}", "  ", format_plan(plan(tiny)))
    for line in (
        "vocab size  265",
        "micro-batch per rank  4 x 32 = 128 tokens",
        "total batch size  256 tokens per step",
        "accumulation steps  2",
        "steps  12 (num_iterations)",
        "schedule  warmup 0, warmdown 2 steps",
    ):
        assert f"  {line}" in banner
    assert re.search(r"parameters  [\d,]+ \(.*matrix 12,288.*\)", banner)
    assert "tokens : params ratio" in banner


def test_the_banner_describes_the_model(tiny: Path) -> None:
    banner = re.sub(r" {2,}", "  ", format_plan(plan(tiny)))
    for line in ("layers  1", "width  32", "heads  2"):
        assert f"  {line}\n" in banner
