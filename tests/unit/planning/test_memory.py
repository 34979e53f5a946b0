"""Memory: what a plan says training needs, and activations that are computed again instead of kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.support import Site, call, losses, only_run

from nanochat_core import ConfigError
from nanochat_core.config.load import load
from nanochat_core.planning.banner import format_plan
from nanochat_core.planning.plan import Planned
from nanochat_core.planning.planner import make_plan, plan_batches
from nanochat_core.plugins.discovery import load_plugins

MODELS = """
import torch
from torch.utils.checkpoint import checkpoint
from nanochat_core import Model

class Stack(Model):
    def __init__(self, config, context):
        super().__init__()
        self.vocab_size, self.hidden_size = context.vocab_size, 8
        self.embedding = torch.nn.Embedding(context.vocab_size, 8)
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(8, 800), torch.nn.Tanh(), torch.nn.Linear(800, 8)) for _ in range(6)
        )
        self.head = torch.nn.Linear(8, context.vocab_size)
        self.again = False
    def hidden(self, ids_BT, cache=None):
        x_BTD = self.embedding(ids_BT)
        for block in self.blocks:
            x_BTD = x_BTD + (checkpoint(block, x_BTD, use_reentrant=False) if self.again else block(x_BTD))
        return x_BTD
    def logits(self, hidden_ND):
        return self.head(hidden_ND).float()

class Checkpointed(Stack):
    def checkpoint_activations(self):
        self.again = True

@hookimpl
def nanochat_register_models(registry):
    registry.add("stack", config=Config, factory="made_up.plugin:Stack")
    registry.add("checkpointed", config=Config, factory="made_up.plugin:Checkpointed")
"""
AGAIN = "train.activation_checkpointing=true"


@pytest.fixture
def stacks(site: Site) -> None:
    site.add("made-up", MODELS)


def plan(file: Path, *overrides: str) -> Planned:
    return make_plan(load(file, overrides, load_plugins()), 1, torch.device("cpu"))


@pytest.mark.usefixtures("stacks")
def test_activations_are_what_is_kept_and_what_is_computed_again(tiny: Path) -> None:
    settings = ("model.plugin=checkpointed", "train.device_batch_size=8", "train.max_seq_len=128")
    settings = (*settings, "train.total_batch_size=1024")
    kept, again = (plan(tiny, *settings, *more).plan.memory["activations"] for more in ((), (AGAIN,)))
    position = 8 * 128 * 4  # bytes of one channel at every position
    assert kept > 6 * (8 + 800) * position  # what enters a block, and what tanh gives
    assert again > (6 * 8 + 800) * position  # what enters each block, and what one of them keeps
    assert again < kept - 4 * 800 * position


@pytest.mark.usefixtures("stacks")
@pytest.mark.parametrize("model", ["gpt", "stack"])
def test_what_a_table_says_is_what_a_plan_of_that_size_says(tiny: Path, model: str) -> None:
    settings = (f"model.plugin={model}", "train.max_seq_len=32", "train.total_batch_size=256")
    _, table = plan_batches(load(tiny, settings, load_plugins()), 1, torch.device("cpu"))
    assert list(table) == [1, 2, 4, 8]
    for rows, memory in table.items():
        assert plan(tiny, *settings, f"train.device_batch_size={rows}").plan.memory == memory
    more, less = (table[rows]["activations"] for rows in (4, 2))
    assert 1.5 * less < more <= 2 * less


@pytest.mark.usefixtures("stacks")
def test_training_does_not_change(tiny: Path, tmp_path: Path) -> None:
    found = []
    for name, more in (("kept", ()), ("again", ("--set", AGAIN))):
        settings = ("--set", "model.plugin=checkpointed", "--set", "optimizer.plugin=adamw")
        result = call("run", tiny, "--runs-dir", tmp_path / name, *settings, *more)
        assert result.code == 0, result.err
        found.append(losses(only_run(tmp_path / name)))
    assert found[0] == found[1]


@pytest.mark.usefixtures("stacks")
def test_a_model_that_cannot_is_refused_before_anything_is_built(tiny: Path, tmp_path: Path) -> None:
    settings = ("model.plugin=stack", AGAIN)
    expected = f'--set {AGAIN}: train.activation_checkpointing: model plugin "stack" has no .*: set it to false'
    with pytest.raises(ConfigError, match=expected):
        plan(tiny, *settings)
    result = call("run", tiny, "--runs-dir", tmp_path / "runs", *(w for s in settings for w in ("--set", s)))
    assert result.code == 2
    assert "set it to false" in result.err
    assert not (tmp_path / "runs").exists()


NO_BACKWARD = """
import torch
from nanochat_core import Model

class Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        if FORWARD and x.device.type == "meta": raise NotImplementedError("no meta kernel")
        return x * 2
    @staticmethod
    def backward(ctx, grad):
        if grad.device.type == "meta": raise NotImplementedError("no meta kernel")
        return grad * 2

class Odd(Model):
    def __init__(self, config, context):
        super().__init__()
        self.vocab_size, self.hidden_size = context.vocab_size, 8
        self.embedding = torch.nn.Embedding(context.vocab_size, 8)
        self.head = torch.nn.Linear(8, context.vocab_size)
    def hidden(self, ids_BT, cache=None): return Forward.apply(self.embedding(ids_BT))
    def logits(self, hidden_ND): return self.head(hidden_ND).float()

@hookimpl
def nanochat_register_models(registry):
    registry.add("odd", config=Config, factory="made_up.plugin:Odd")
"""


@pytest.mark.parametrize("forward", [False, True])
def test_what_the_meta_device_cannot_do_is_no_obstacle(site: Site, tiny: Path, forward: bool) -> None:
    site.add("made-up", f"FORWARD = {forward}\n{NO_BACKWARD}")
    planned = plan(tiny, "model.plugin=odd")
    assert ("activations" in planned.plan.memory) != forward
    assert ("activations unknown" in format_plan(planned)) == forward
