"""Checkpoints outlive their plugins' defaults, names of options and parameters, and older formats of checkpoints."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from helpers.support import Result, Site, Trained, assert_same_end, call, losses, metrics, only_run

from nanochat_core.plugins.discovery import load_plugins
from nanochat_core.runs.checkpoint import verify

# A release of a model: {gain} and {head} are the names of an option and a parameter, {default} the option's default.
RELEASE = """
import torch
from nanochat_core import Model

@attrs.frozen
class Config:
    {gain}: float = option({default}, "factor on the logits")
    limit: float | None = option({limit}, "largest logit")
    shape: tuple[int, ...] = option((8,), "sizes")

class Bigram(Model):
    def __init__(self, config, context):
        super().__init__()
        self.config = config
        self.vocab_size, self.hidden_size = context.vocab_size, config.shape[0]
        self.embedding = torch.nn.Embedding(context.vocab_size, config.shape[0])
        self.{head} = torch.nn.Linear(config.shape[0], context.vocab_size, bias=False)
    def hidden(self, ids_BT, cache=None):
        return self.embedding(ids_BT)
    def logits(self, hidden_ND):
        logits_NV = self.{head}(hidden_ND).float() * self.config.{gain}
        return logits_NV if self.config.limit is None else logits_NV.clamp(max=self.config.limit)

@hookimpl
def nanochat_register_models(registry):
    registry.add("bigram", config=Config, factory="made_up.plugin:Bigram"{more})
"""
UPGRADE = """
def upgrade(version, options, tensors):
    assert version == 1
    options["scale"] = options.pop("gain")
    tensors["output.weight"] = tensors.pop("head.weight")
    return options, tensors
"""


def release(
    gain: str = "gain", default: float = 2.0, limit: float | None = None, head: str = "head", more: str = ""
) -> str:
    return RELEASE.format(gain=gain, default=default, limit=limit, head=head, more=more)


SECOND = release("scale", 7.0, 0.5, "output", ', version=2, upgrade="made_up.plugin:upgrade"') + UPGRADE
CHOICE = ("--set", "model.plugin=bigram", "--set", "optimizer.plugin=adamw")


class Made:
    """A run of the first release."""

    def __init__(self, site: Site, tiny: Path, tmp_path: Path) -> None:
        self.site, self.file, self.runs = site, tiny, tmp_path / "runs"
        site.add("made-up", release())
        result = call("run", tiny, "--runs-dir", self.runs, *CHOICE)
        assert result.code == 0, result.err
        self.path = only_run(self.runs)
        self.checkpoint = self.path / "checkpoints" / "step_000012"
        self.before = self.look()

    def look(self) -> tuple[str, float]:
        """What ``sample`` and ``eval`` say of it."""
        sampled = self.sample()
        assert sampled.code == 0, sampled.err
        evaluated = call("eval", "tiny", "--runs-dir", self.runs, "--evaluator", "bpb")
        assert evaluated.code == 0, evaluated.err
        facts = json.loads((self.path / "evaluations" / "bpb_000012" / "evaluation.json").read_text())
        return sampled.out, facts["metrics"]["val/bpb"]

    def sample(self) -> Result:
        return call("sample", "tiny", "one, ", "--runs-dir", self.runs, "--temperature", 0.5, "--max-tokens", 40)

    def train(self, *more: str) -> Result:
        return call("run", self.file, "--runs-dir", self.runs, *CHOICE, *more)

    def edit(self, **changes: object) -> None:
        """Change the manifest; None removes."""
        file = self.checkpoint / "manifest.json"
        manifest = json.loads(file.read_text()) | changes
        manifest = {key: value for key, value in manifest.items() if value is not None and key != "sha256"}
        manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        file.write_text(json.dumps(manifest))


@pytest.fixture
def made(site: Site, tiny: Path, tmp_path: Path) -> Made:
    return Made(site, tiny, tmp_path)


def test_a_checkpoint_has_every_option(made: Made) -> None:
    manifest = json.loads((made.checkpoint / "manifest.json").read_text())
    options = {"gain": 2.0, "limit": None, "shape": [8]}
    assert manifest["version"] == 3
    assert manifest["model"] == {"plugin": "bigram", "version": 1, "options": options}


def test_another_default_changes_no_older_checkpoint(made: Made) -> None:
    made.site.change("made-up", release(default=7.0, limit=0.5))
    assert made.look() == made.before
    assert metrics(made.path, "val/bpb")[12] == pytest.approx(made.before[1], rel=1e-6)


def test_a_new_version_reads_older_ones_through_its_upgrade(made: Made) -> None:
    made.site.change("made-up", SECOND)
    assert made.look() == made.before


def test_commands_that_need_no_weights_know_its_options_too(made: Made) -> None:
    made.site.change("made-up", SECOND)  # which has no option "gain"
    shown = call("tokenizer", "show", "tiny", "one", "--runs-dir", made.runs)
    assert shown.code == 0, shown.err
    sent = call("log-sync", "tiny", "--to", "csv", "--runs-dir", made.runs)
    assert sent.code == 0, sent.err
    told = json.loads((made.path / "csv" / "run.json").read_text())["experiment"]["model"]
    assert told == {"plugin": "bigram", "scale": 2.0, "shape": [8]}


def test_a_checkpoint_of_the_first_format_takes_the_options_of_its_run(made: Made) -> None:
    made.edit(version=1, model=None)
    made.site.change("made-up", release(default=7.0))
    assert made.look() == made.before
    made.site.change("made-up", SECOND.replace("0.5", "None"))  # it could not say that it had no limit
    assert made.look() == made.before
    (made.path / "experiment.toml").write_text("[run]\nname = 'tiny'\n")
    result = made.sample()
    assert result.code == 2
    assert f"needs [model] of its run's {made.path / 'experiment.toml'}" in result.err


def test_a_checkpoint_of_the_second_format_goes_on_to_the_same_end(trained: Trained, tmp_path: Path) -> None:
    """Its manifest had no checksum of its own, its state knew less."""
    shutil.copytree(trained.runs, tmp_path / "runs")
    path = only_run(tmp_path / "runs")
    shutil.rmtree(path / "checkpoints/step_000012")
    checkpoint = path / "checkpoints/step_000008"
    later = {"loss_spread", "loss_scale", "scaled_steps", "comparable_from", "fingerprints"}
    state = {k: v for k, v in json.loads((checkpoint / "state.json").read_text()).items() if k not in later}
    content = json.dumps(state).encode()
    (checkpoint / "state.json").write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["version"] = 2
    manifest["files"]["state.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert verify(checkpoint) == ""
    result = call("run", trained.file, "--runs-dir", tmp_path / "runs", "--resume")
    assert result.code == 0, result.err
    assert "from step_000008" in result.out
    assert_same_end(path, trained.path)
    assert json.loads((path / "checkpoints/step_000012/manifest.json").read_text())["version"] == 3

    model = checkpoint / "model.safetensors"  # damage is still found
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    assert "model.safetensors is damaged" in verify(checkpoint)


@pytest.mark.parametrize(
    ("plugin", "version", "words", "names_the_checkpoint"),
    [
        (release(), 3, "made-up 1.0 supports versions up to 1: install a newer made-up", True),
        (release(more=", version=2"), 1, "made-up 1.0 has version 2 and can't read older ones", True),
        (SECOND, 0, "AssertionError", True),
        (
            SECOND.replace("plugin:upgrade", "plugin:missing"),
            1,
            "model 'bigram' of made-up 1.0 can't be imported",
            False,
        ),
    ],
)
def test_what_cannot_be_read_says_why(
    made: Made, plugin: str, version: int, words: str, names_the_checkpoint: bool
) -> None:
    model = json.loads((made.checkpoint / "manifest.json").read_text())["model"]
    made.edit(model={**model, "version": version})
    made.site.change("made-up", plugin)
    for result in (made.sample(), call("eval", made.checkpoint, "--runs-dir", made.runs)):
        assert result.code == 2
        assert words in result.err
        assert (str(made.checkpoint) in result.err) is names_the_checkpoint


# ---------------------------------------------------------------------------------------------- going on with training


def test_a_resumed_run_does_not_take_a_new_default(made: Made) -> None:
    shutil.rmtree(made.checkpoint)
    made.site.change("made-up", release(default=7.0))
    result = made.train("--resume")
    assert result.code == 2
    keep = "--set 'model.gain=2.0'"
    assert f"model.gain: was 2.0 in {made.path}, is 7.0: a resumed run can't change it; keep it ({keep})" in result.err
    made.site.change("made-up", release(default=7.0, limit=0.5))
    result = made.train("--resume", "--set", "model.gain=2.0")
    assert "model.limit: was None in" in result.err
    assert (
        "the old value can't be written in TOML: install the release it was made with, or start a fresh run"
        in result.err
    )
    made.site.change("made-up", release(default=7.0))
    result = made.train("--resume", "--set", "model.gain=2.0")
    assert result.code == 0, result.err
    assert made.look() == made.before


def test_a_run_is_not_resumed_across_versions(made: Made) -> None:
    shutil.rmtree(made.checkpoint)
    made.site.change("made-up", SECOND)
    result = made.train("--resume")
    assert result.code == 2
    assert (
        "has version 1 of model 'bigram', made-up 1.0 has version 2, and a run can't continue with a different version"
        in result.err
    )
    assert f"--set train.init_from={made.path}" in result.err
    assert list(losses(made.path)) == list(range(12))


def test_weights_of_an_older_version_start_a_new_run(made: Made) -> None:
    made.site.change("made-up", SECOND.replace("0.5", "None"))
    settings = ("--set", f"train.init_from={made.path}", "--set", "run.name=second")
    result = made.train(*settings)
    assert result.code == 2
    ways = "--set 'model.scale=2.0' or --set 'model.scale=7.0'"
    assert f"model.scale: was 2.0 in {made.checkpoint}, the default is 7.0: choose one with {ways}" in result.err
    assert not (made.runs / "second").exists()
    for scale in (2.0, 7.0):
        result = made.train(*settings, "--set", f"model.scale={scale}", "--set", f"run.name=scale{scale:.0f}")
        assert result.code == 0, result.err
        assert ("changed from" in result.out) == (scale == 7.0)
        (run,) = (made.runs / f"scale{scale:.0f}").iterdir()
        first = metrics(run, "val/bpb")[0]
        assert (first == pytest.approx(made.before[1], rel=1e-6)) == (scale == 2.0)


def test_only_models_have_versions(site: Site) -> None:
    hook = "@hookimpl\ndef nanochat_register_optimizers(registry):\n"
    site.add("made-up", f'{hook}    registry.add("x", config=Config, factory="a:b", version=2)\n')
    (failure,) = [f for f in load_plugins().failures if f.distribution == "made-up"]
    assert "only models have a version and an upgrade" in failure.reason
