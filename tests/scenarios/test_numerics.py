"""Numbers that go wrong: float16 and its loss scale, spikes, the diagnosis of a divergence; and determinism."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.support import Site, assert_same_end, call, ledger, losses, metrics, only_run, write_experiment

from nanochat_core.data.best_fit import BestFitLane
from nanochat_core.data.packing import StreamLane
from nanochat_core.runs.state import TrainState


def run(file: Path, runs: Path, *settings: str) -> tuple[Path, str]:
    result = call("run", file, "--runs-dir", runs, *(word for s in settings for word in ("--set", s)))
    assert result.code == 0, result.err
    return only_run(runs), result.out


# ----------------------------------------------------------------------------------------------------------- float16


def test_float16_learns_what_float32_learns_and_resumes_exactly(tiny: Path, tmp_path: Path) -> None:
    wide, _ = run(tiny, tmp_path / "wide")
    narrow, _ = run(tiny, tmp_path / "narrow", "train.dtype=float16")
    assert list(losses(narrow).values()) == pytest.approx(list(losses(wide).values()), rel=2e-3)
    assert {record["train/loss_scale"] for record in ledger(narrow) if "train/loss" in record} == {2**16 / (4 * 32)}

    for step in (8, 12):  # as if it had been killed after step 4
        for file in (narrow / f"checkpoints/step_{step:06d}").iterdir():
            file.unlink()
    result = call("run", tiny, "--runs-dir", tmp_path / "narrow", "--resume", "--set", "train.dtype=float16")
    assert result.code == 0, result.err
    assert "from step_000004" in result.out
    run(tiny, tmp_path / "again", "train.dtype=float16")
    assert_same_end(narrow, only_run(tmp_path / "again"))


STEEP = """
import torch
from torch import nn
from nanochat_core import Model

class Steep(Model):
    '''The gradient of its hidden states, which are float16, is 2^8 times what it is elsewhere.'''
    def __init__(self, context):
        super().__init__()
        self.hidden_size, self.vocab_size = 16, context.vocab_size
        self.embedding = nn.Embedding(context.vocab_size, 16)
        self.head = nn.Linear(16, context.vocab_size, bias=False)
    def hidden(self, ids_BT, cache=None): return (self.embedding(ids_BT) / 2**8).half()
    def logits(self, hidden_ND): return self.head((hidden_ND * 2**8).float()).float()
    def flops_per_token(self, max_seq_len): return 1

def build(config, context): return Steep(context)

@hookimpl
def nanochat_register_models(registry):
    registry.add("steep", config=Config, factory="made_up.plugin:build")
"""


def test_a_gradient_that_float16_can_not_hold_halves_the_scale(site: Site, tiny: Path, tmp_path: Path) -> None:
    site.add("made-up", STEEP)
    tiny.write_text(
        tiny.read_text().replace('plugin = "gpt"\ndepth = 1\naspect_ratio = 32\nhead_dim = 16', 'plugin = "steep"')
    )
    settings = ("optimizer.plugin=adamw", "train.device_batch_size=1", "evaluators.bpb.every=1")
    path, out = run(tiny, tmp_path / "runs", "train.dtype=float16", *settings)
    records = [record for record in ledger(path) if "train/loss" in record]
    first = 2**16 / 32
    skipped = [record for record in records if "train/skipped" in record]
    assert skipped == records[: len(skipped)]  # too large at the start, and then no more
    assert 1 <= len(skipped) < 8
    assert out.count("not finite, the update is skipped") == len(skipped)
    scales = [record["train/loss_scale"] for record in records]
    assert scales == [first / 2 ** min(step + 1, len(skipped)) for step in range(12)]
    after = [metrics(path, "val/bpb")[step] for step in range(1, 13)]  # the update of each step
    assert len(set(after[: len(skipped)])) == 1  # a skipped update changes nothing
    assert len(set(after[len(skipped) - 1 :])) == 13 - len(skipped)  # all others do
    assert records[-1]["train/loss"] < records[len(skipped)]["train/loss"]
    assert torch.tensor([record["train/grad_norm"] for record in records[len(skipped) :]]).isfinite().all()


def test_a_run_with_all_skipped_steps_has_diverged(site: Site, tiny: Path, tmp_path: Path) -> None:
    """Also one that is too short for train.max_skipped_steps."""
    site.add("made-up", STEEP.replace(".float()).float()", ".float()).float() / 0"))
    settings = ("model.plugin=steep", "optimizer.plugin=adamw", "train.num_iterations=3", "train.dtype=float32")
    words = [word for setting in settings for word in ("--set", setting)]
    result = call("run", tiny, "--runs-dir", tmp_path / "runs", *words)
    assert result.code == 3, result.err
    assert "none of the 3 steps had a finite loss" in result.err
    assert json.loads((only_run(tmp_path / "runs") / "status.json").read_text())["status"] == "failed"
    assert "Next:" not in result.out


def test_the_loss_scale_is_doubled_after_two_thousand_good_steps() -> None:
    state = TrainState()
    state.begin_loss_scale(3000)
    assert state.loss_scale == 16  # a power of two, near what the mean of 3000 tokens would have

    def go_on(finite: bool, steps: int) -> float:
        for _ in range(steps):
            state.adapt_loss_scale(finite)
        return state.loss_scale

    assert go_on(True, 1999) == 16
    assert go_on(False, 1) == 8
    assert go_on(True, 1999) == 8
    assert go_on(True, 1) == 16
    state.begin_loss_scale(1)  # it is known already
    assert TrainState.from_json(state.to_json()) == state
    assert go_on(True, 2000) == 32


# ------------------------------------------------------------------------------------------------------------ spikes


def test_a_loss_spike_is_reported(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    generator = torch.Generator().manual_seed(1)
    good = ["one two three four five six seven eight nine ten " * 3] * 560
    odd = ["".join(chr(33 + i) for i in torch.randint(0, 90, (160,), generator=generator).tolist()) for _ in range(64)]
    for index, texts in enumerate((good + odd, good[:8])):
        pq.write_table(pa.table({"text": texts}), tmp_path / f"shards/shard_{index:05d}.parquet")
    file = write_experiment(tmp_path / "spiky.toml", tmp_path / "shards")
    path, out = run(
        file, tmp_path / "runs", "train.num_iterations=95", "train.total_batch_size=1024",
        "train.device_batch_size=32", "checkpoint.save_every=200", "evaluators.bpb.every=0",
    )  # fmt: skip
    records = [record for record in ledger(path) if "train/loss" in record]
    spikes = {record["step"]: record["train/loss_spike"] for record in records if "train/loss_spike" in record}
    assert 1 <= len(spikes) <= 3  # once it goes on, it is no spike
    first = min(spikes)
    assert first > 50
    assert spikes[first] > 6
    assert records[first]["train/loss"] > 1.1 * records[first - 1]["train/loss"]
    assert f"step {first}: the loss spikes: {records[first]['train/loss']:.4f}, " in out


# ------------------------------------------------------------------------------------------- what stood in the batch

BREAKS = """
import torch
from nanochat_gpt.model import GPT

class Breaks(GPT):
    '''Has no finite loss for rows with an x.'''
    def hidden(self, ids_BT, cache=None):
        hidden_BTD = super().hidden(ids_BT, cache)
        return torch.where((ids_BT == ord("x")).any(-1)[:, None, None], torch.nan, hidden_BTD)

from nanochat_gpt.config import GPTConfig
def build(config, context): return Breaks(config, context)

@hookimpl
def nanochat_register_models(registry):
    registry.add("breaks", config=GPTConfig, factory="made_up.plugin:build")
"""


def test_the_diagnosis_of_a_divergence_names_rows_and_documents(site: Site, tmp_path: Path) -> None:
    site.add("made-up", BREAKS)
    (tmp_path / "shards").mkdir()
    texts = [f"{number:02d} {'x' if number == 41 else 'y'} {'words ' * 9}" for number in range(64)]
    for index in range(2):
        pq.write_table(
            pa.table({"text": texts if index == 0 else texts[:8]}), tmp_path / f"shards/shard_{index:05d}.parquet"
        )
    file = write_experiment(tmp_path / "tiny.toml", tmp_path / "shards")
    settings = (
        "model.plugin=breaks",
        "model.depth=1",
        "model.aspect_ratio=32",
        "model.head_dim=16",
        "train.max_skipped_steps=0",
    )
    result = call("run", file, "--runs-dir", tmp_path / "runs", *(word for s in settings for word in ("--set", s)))
    assert result.code == 3, result.err
    (report,) = only_run(tmp_path / "runs").glob("diverged_step_*.json")
    assert str(report) in result.err
    found = json.loads(report.read_text())
    (part,) = found["ranks"]
    documents = {entry["document"]: entry["begins"] for entry in part["documents"]}
    assert documents[41].startswith("41 x words")
    assert all(begins.startswith(f"{index:02d} ") for index, begins in documents.items())
    assert len(documents) < 32
    assert [row["loss"] for row in part["rows"]].count("nan") == 1
    (bad,) = [row["row"] for row in part["rows"] if row["loss"] == "nan"]
    assert f"rows with a loss that is not finite: {bad} of rank 0" in result.err
    assert "its batch holds the training documents " in result.err


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_documents_of_rows_are_those_whose_tokens_they_hold(packing: str) -> None:
    """Every document is told by its tokens; over an epoch's end too."""

    class Numbers:
        def __len__(self) -> int:
            return 40

        def read(self, indices: range) -> list[object]:
            return [torch.full((5 + index % 7,), index, dtype=torch.int32).numpy() for index in indices]

    kind = BestFitLane if packing == "best_fit" else StreamLane
    lane = kind(Numbers(), 12, 1, 2, window=4)  # type: ignore[arg-type]
    for _ in range(30):
        before = lane.cursor
        rows = lane.next_rows(3)
        exit_stack = set(rows.tokens[:, :-1].flatten().tolist())
        named = lane.documents(before, lane.cursor)
        assert exit_stack <= set(named)
        assert named == sorted(set(named))
        if packing == "stream":
            assert set(named) <= {*exit_stack, *rows.tokens[:, -1].tolist()}


# ------------------------------------------------------------------------------------------------------- determinism


def test_deterministic_is_set_while_the_run_lasts_and_gives_the_same_numbers(
    site: Site, tiny: Path, tmp_path: Path
) -> None:
    site.add(
        "made-up",
        "import torch\nfrom nanochat_core import Evaluation, Evaluator\n"
        "class Tells(Evaluator):\n"
        "    def __init__(self, config, context): pass\n"
        "    def evaluate(self, model, step):\n"
        "        return Evaluation({'val/is': int(torch.are_deterministic_algorithms_enabled())})\n"
        "@hookimpl\ndef nanochat_register_evaluators(registry):\n"
        "    registry.add('tells', config=Config, factory='made_up.plugin:Tells')\n",
    )
    plain, _ = run(tiny, tmp_path / "plain", "evaluators.t.plugin=tells")
    exact, _ = run(tiny, tmp_path / "exact", "evaluators.t.plugin=tells", "train.deterministic=true")
    told = [[record["t/val/is"] for record in ledger(path) if "t/val/is" in record] for path in (plain, exact)]
    assert told == [[0], [1]]
    assert not torch.are_deterministic_algorithms_enabled()
    assert losses(plain) == losses(exact)
