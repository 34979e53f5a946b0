"""Out of memory in a run: what was trained is saved, and the message says what to change."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.ranks import call_on_ranks
from helpers.support import Site, call, losses, only_run

GREEDY = """
import torch
from nanochat_core import Model

class Greedy(Model):
    def __init__(self, config, context):
        super().__init__()
        self.vocab_size, self.hidden_size = context.vocab_size, 8
        self.embedding = torch.nn.Embedding(context.vocab_size, 8)
        self.head = torch.nn.Linear(8, context.vocab_size)
        self.passes = 0
    def hidden(self, ids_BT, cache=None):
        self.passes += self.training and not ids_BT.is_meta
        if self.passes > LIMIT:
            FAIL
        return self.embedding(ids_BT)
    def logits(self, hidden_ND): return self.head(hidden_ND).float()

@hookimpl
def nanochat_register_models(registry):
    registry.add("greedy", config=Config, factory="made_up.plugin:Greedy")
"""
TOO_MUCH = "torch.empty(2**55, dtype=torch.uint8)"
OPTIONS = ("--set", "model={plugin = 'greedy'}", "--set", "optimizer={plugin = 'adamw'}")


@pytest.mark.parametrize("steps", [0, 5])
def test_out_of_memory_names_what_to_change_after_saving(site: Site, tiny: Path, tmp_path: Path, steps: int) -> None:
    # in the second of a step's two micro-batches
    site.add("made-up", f"LIMIT = {2 * steps + 1}\n{GREEDY.replace('FAIL', TOO_MUCH)}")
    runs = tmp_path / "runs"
    result = call("run", tiny, "--runs-dir", runs, *OPTIONS)
    assert result.code == 4, result.err
    assert f"out of memory while training step {steps}; the estimate was" in result.err
    assert "train.device_batch_size, now 4" in result.err
    assert "train.activation_checkpointing = true" in result.err
    (run,) = (path for path in runs.glob("*/*") if path.is_dir())
    saved = {path.name for path in (run / "checkpoints").glob("step_*")}
    assert saved == ({"step_000004", "step_000005"} if steps else set())
    if steps:
        assert len(losses(only_run(runs))) == steps


def test_other_errors_stay_what_they_are(site: Site, tiny: Path, tmp_path: Path) -> None:
    site.add("made-up", f"LIMIT = 1\n{GREEDY.replace('FAIL', 'torch.ones(2) @ torch.ones(3)')}")
    result = call("run", tiny, "--runs-dir", tmp_path / "runs", *OPTIONS)
    assert result.code == 2
    assert "RuntimeError: " in result.err
    assert "size" in result.err
    assert "memory" not in result.err


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("micro_batch", [0, 1])
def test_out_of_memory_on_one_of_two_ranks_saves_and_ends_both(
    site: Site, tiny: Path, tmp_path: Path, micro_batch: int
) -> None:
    """In the first or the last micro-batch of a rank's step, where sums over ranks have begun."""
    where = "if __import__('os').environ.get('RANK') == '1': " + TOO_MUCH
    site.add("made-up", f"LIMIT = {2 * 5 + micro_batch}\n{GREEDY.replace('FAIL', where)}")
    runs = tmp_path / "runs"
    options = (*OPTIONS, "--set", "train.device_batch_size=2")
    result = call_on_ranks(2, "run", tiny, "--runs-dir", runs, *options, site=site)
    assert result.code == 4, result.err
    err = result.err
    assert err.count("out of memory while training step 5") == 1
    assert err.startswith("rank 1: out of memory")
    assert "Traceback" not in err
    run = only_run(runs)
    assert {path.name for path in (run / "checkpoints").glob("step_*")} == {"step_000004", "step_000005"}
    assert list(losses(run)) == list(range(5))
