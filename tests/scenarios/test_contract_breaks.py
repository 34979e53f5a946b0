"""Parts of plugins that break their contract: the run is refused before it trains, with the plugin and the rule."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.support import Site, call

BROKEN = """
import sys
import numpy as np
import torch
from nanochat_core import DataSource, Model, Optimizer
from nanochat_core.testing.evaluator import _Bytes
from nanochat_core.testing.optimizer import TinyModel

@attrs.frozen
class Mode:
    mode: str

class Broken(TinyModel):
    def __init__(self, mode, vocab_size):
        super().__init__(vocab_size)
        self.mode = mode
    def hidden(self, ids_BT, cache=None):
        hidden_BTD = super().hidden(ids_BT, cache)
        return hidden_BTD[:, :-1] if self.mode == "short" else hidden_BTD
    def logits(self, hidden_ND):
        logits_NV = super().logits(hidden_ND)
        match self.mode:
            case "few": return logits_NV[:, :-1]
            case "many": return torch.cat([logits_NV, logits_NV], 1)
            case "half": return logits_NV.half()
            case "detached": return logits_NV.detach()
            case "nothing": return None
        return logits_NV
    def flops_per_token(self, max_seq_len):
        return {"negative": -1.0, "nan": float("nan"), "zero": 0, "text": "x"}.get(self.mode, 1e4)
    def parameter_roles(self):
        return {"roles": None}.get(self.mode, super().parameter_roles())
    def describe(self):
        return {"describe": {"a": object()}}.get(self.mode, {})

def model(config, context):
    match config.mode:
        case "none": return None
        case "module": return torch.nn.Linear(2, 2)
        case "exit": sys.exit(0)
        case "interrupt": raise KeyboardInterrupt
    made = Broken(config.mode, context.vocab_size)
    if config.mode == "frozen": made.requires_grad_(False)
    if config.mode == "size": made.hidden_size = None
    return made

def optimizer(config, context):
    return None if config.mode == "none" else torch.optim.SGD(context.parameters.values())

class Source(DataSource):
    def __init__(self, config, context): self.mode = config.mode
    def documents(self, split):
        texts = ["some words"] * 50
        match self.mode:
            case "none": return None
            case "set": return set(texts)
            case "generator": return (text for text in texts)
            case "text": return "some words"
            case "bytes": return [b"some words"] * 50
            case "numbers": return [5] * 50
            case "exit": sys.exit(0)
        return texts
    def fingerprint(self, split):
        return None if self.mode == "fingerprint" else super().fingerprint(split)

class Tokens(_Bytes):
    def __init__(self, mode):
        self.mode = mode
        if mode == "bos": self.special_tokens = {"<|bos|>": 257}
        if mode == "size": self.vocab_size = "x"
        if mode == "fingerprint": self.fingerprint = None
    def encode(self, text):
        ids = super().encode(text)
        match self.mode:
            case "none": return None
            case "fraction": return [i + 0.5 for i in ids]
            case "outside": return [i + 1000 for i in ids]
            case "sometimes": return [i + 1000 for i in ids] if len(ids) > 10 else ids
            case "later": return [i + 0.5 for i in ids] if len(ids) > 10 else ids
        return ids
    def token_bytes(self):
        counts = super().token_bytes()
        wrong = {"negative": -counts, "floats": counts * 1.5, "less": counts[:5], "nocounts": None}
        return wrong.get(self.mode, counts)

def tokens(config, context): return Tokens(config.mode)

@hookimpl
def nanochat_register_models(registry): registry.add("bad", config=Mode, factory="made_up.plugin:model")
@hookimpl
def nanochat_register_optimizers(registry): registry.add("bad", config=Mode, factory="made_up.plugin:optimizer")
@hookimpl
def nanochat_register_data_sources(registry): registry.add("bad", config=Mode, factory="made_up.plugin:Source")
@hookimpl
def nanochat_register_tokenizers(registry): registry.add("bad", config=Mode, factory="made_up.plugin:tokens")
"""

CASES = [
    ("model", "none", "must return a nanochat_core.Model"), ("model", "module", "must return a nanochat_core.Model"),
    ("model", "exit", "SystemExit: 0"), ("model", "interrupt", "KeyboardInterrupt"),
    ("model", "frozen", "no trainable parameters"), ("model", "size", "hidden_size"), ("model", "roles", "roles()"),
    ("model", "describe", "describe()"), ("model", "short", "hidden must return"), ("model", "few", "logits must"),
    ("model", "many", "logits must"), ("model", "half", "logits must"), ("model", "nothing", "logits must"),
    ("model", "detached", "learn nothing"), ("model", "negative", "flops_per_token"), ("model", "nan", "flops_per"),
    ("model", "zero", "flops_per_token"), ("model", "text", "flops_per_token"),
    ("optimizer", "none", "must return a nanochat_core.Optimizer"), ("optimizer", "torch", "TorchOptimizer"),
    ("data", "none", "sequence of texts"), ("data", "set", "sequence of texts"), ("data", "generator", "sequence of"),
    ("data", "text", "sequence of texts"), ("data", "bytes", "must be a str"), ("data", "numbers", "must be a str"),
    ("data", "fingerprint", "fingerprint"), ("data", "exit", "SystemExit: 0"),
    ("tokenizer", "bos", "must be in [0, 257), not 257"), ("tokenizer", "size", "vocab_size"),
    ("tokenizer", "fingerprint", "fingerprint"), ("tokenizer", "none", "must return a list of ids"),
    ("tokenizer", "fraction", "must return a list of ids"), ("tokenizer", "outside", "must return a list of ids"),
    ("tokenizer", "sometimes", "outside [0, 257)"), ("tokenizer", "later", "whole numbers"),
    ("tokenizer", "negative", "token_bytes()"), ("tokenizer", "floats", "token_bytes()"),
    ("tokenizer", "less", "token_bytes()"), ("tokenizer", "nocounts", "token_bytes()"),
]  # fmt: skip
KINDS = {"data": "data source"}


@pytest.mark.parametrize(("table", "mode", "rule"), CASES)
def test_it_is_refused_by_name(site: Site, tiny: Path, tmp_path: Path, table: str, mode: str, rule: str) -> None:
    site.add("made-up", BROKEN)
    text = tiny.read_text(encoding="utf-8")
    own = f'[{table}]\nplugin = "bad"\nmode = "{mode}"\n\n'
    tiny.write_text(re.sub(rf"(?ms)^\[{table}\]\n.*?(?=^\[)", own, text), encoding="utf-8")
    result = call("run", tiny, "--runs-dir", tmp_path / "runs")
    assert result.code == 2, result.err
    assert f"{KINDS.get(table, table)} 'bad' of made-up 1.0" in result.err
    assert rule in result.err
    assert "Traceback" not in result.err
    assert "step 0000" not in result.out
    assert "train/loss" not in "".join(file.read_text() for file in (tmp_path / "runs").rglob("metrics.jsonl"))
