"""Interrupted or not, a run ends with the same bits: every optimizer, tokenizer and source that nanochat ships, at
every kind of moment."""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.hub_server import serve
from helpers.recipes import MODERN_MUON
from helpers.support import Site, assert_same_end, call, ledger, metrics, only_run, write_experiment

STEPS = 12
MODERN = (
    "model.depth=2", "model.value_embeddings=true", "model.residual_scalars=true", "model.smear=true",
    "model.backout=true", "model.init=modern", "model.window_pattern=SL",
    *(f"optimizer.{name}={json.dumps(value)}" for name, value in MODERN_MUON.items()),
)  # fmt: skip
BEST_FIT = ("data.packing=best_fit", "data.packing_window=4")


def words(count: int, seed: int = 1) -> list[str]:
    """Documents of made-up words."""
    draw = random.Random(seed)
    known = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(60)]
    return [" ".join(draw.choices(known, k=draw.randint(5, 40))) for _ in range(count)]


def write_parquet(directory: Path, train: int) -> Path:
    directory.mkdir(exist_ok=True)
    for index, texts in enumerate((words(train), words(12, seed=2))):
        pq.write_table(pa.table({"text": texts}), directory / f"shard_{index:05d}.parquet")
    return directory


def with_source(file: Path, data: str) -> None:
    """Replace the experiment's table ``[data]``."""
    head, _, tail = file.read_text().partition('plugin = "parquet"')
    if tail:
        file.write_text(head + data + tail[tail.index("\n\n") :])


class Experiment:
    """An experiment that saves every step, and its uninterrupted run."""

    def __init__(self, directory: Path, *settings: str, train: int = 200) -> None:
        self.directory = directory
        self.file = write_experiment(directory / "tiny.toml", write_parquet(directory / "shards", train))
        fixed = ("checkpoint.save_every=1", "evaluators.samples.every=6", f"train.num_iterations={STEPS}")
        self.settings = [word for setting in (*fixed, *settings) for word in ("--set", setting)]
        result = self.run(directory / "whole")
        assert result.code == 0, result.err
        self.whole = only_run(directory / "whole")

    def run(self, runs: Path, *more: str):  # type: ignore[no-untyped-def]
        return call("run", self.file, "--runs-dir", runs, *self.settings, *more)

    def copy(self) -> Path:
        """The uninterrupted run, to be interrupted."""
        shutil.rmtree(self.directory / "runs", ignore_errors=True)
        shutil.copytree(self.directory / "whole", self.directory / "runs")
        return only_run(self.directory / "runs")

    def resume_at(self, run: Path, *steps: int) -> None:
        """Go on from each of ``steps`` to the end, as if it had been killed each time before it saved the next."""
        for step in steps:
            forget(run, step)
            result = self.run(run.parents[1], "--resume")
            assert result.code == 0, result.err
            assert f"from step_{step:06d}" in result.out
            assert_same_end(run, self.whole)


def forget(run: Path, after: int) -> None:
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name[5:]) > after:
            shutil.rmtree(checkpoint)


# ----------------------------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize(
    "settings",
    [
        ("optimizer.plugin=adamw",),
        ("optimizer.plugin=adamw", "train.dtype=bfloat16", "train.device_batch_size=2", *BEST_FIT),
        ("train.grad_clip=0.1", "train.device_batch_size=2"),
        MODERN,
        (*MODERN, *BEST_FIT, "data.cache=true", "checkpoint.asynchronous=true", "train.activation_checkpointing=true"),
    ],
    ids=["adamw", "adamw, bfloat16, accumulation", "muon", "modern", "modern, best_fit, cache"],
)
def test_optimizers_and_options(tmp_path: Path, settings: tuple[str, ...]) -> None:
    experiment = Experiment(tmp_path, *settings)
    experiment.resume_at(experiment.copy(), 7, 3, 8)


# ---------------------------------------------------------------------------------------------------- tokenizers, data


def bpe(_: Path) -> tuple[str, ...]:
    return ("tokenizer.plugin=bpe", "tokenizer.vocab_size=320")


def sentencepiece(_: Path) -> tuple[str, ...]:
    pytest.importorskip("sentencepiece")
    return ("tokenizer.plugin=sentencepiece", "tokenizer.vocab_size=310")


def tiktoken(directory: Path) -> tuple[str, ...]:
    tokens = [*(bytes([b]) for b in range(256)), b"ab", b"cd", b"abcd", b" a"]
    file = directory / "small.tiktoken"
    file.write_text("".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens)))
    return ("tokenizer.plugin=tiktoken", f"tokenizer.path={file}", r"tokenizer.pattern=' ?\p{L}+|\s+|[^\s\p{L}]+'")


def huggingface(directory: Path) -> tuple[str, ...]:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(words(50), trainer)
    made.save(str(directory / "tokenizer.json"))
    return ("tokenizer.plugin=huggingface", f"tokenizer.path={directory / 'tokenizer.json'}")


@pytest.mark.parametrize("tokenizer", [bpe, sentencepiece, tiktoken, huggingface], ids=lambda t: t.__name__)
def test_tokenizers(tmp_path: Path, tokenizer: Callable[[Path], tuple[str, ...]]) -> None:
    experiment = Experiment(tmp_path, *tokenizer(tmp_path), *BEST_FIT, "optimizer.plugin=adamw")
    experiment.resume_at(experiment.copy(), 5)


def text(directory: Path) -> str:
    (directory / "texts").mkdir()
    for index, document in enumerate(words(60)):
        (directory / "texts" / f"{index:03d}.txt").write_text(document)
    return f'plugin = "text"\npath = "{(directory / "texts").as_posix()}"\nval_fraction = 0.1'


def jsonl(directory: Path) -> str:
    file = directory / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in words(60)))
    return f'plugin = "jsonl"\npath = "{file.as_posix()}"\nval_fraction = 0.1'


def python_docs(_: Path) -> str:
    return 'plugin = "python_docs"'


@pytest.mark.parametrize("source", [text, jsonl, python_docs], ids=lambda s: s.__name__)
@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_sources(tmp_path: Path, source: Callable[[Path], str], packing: str) -> None:
    """Those of parquet files are in the other tests."""
    data = source(tmp_path)

    class OfSource(Experiment):
        def run(self, runs: Path, *more: str):  # type: ignore[no-untyped-def]
            with_source(self.file, data)
            return super().run(runs, *more)

    experiment = OfSource(tmp_path, f"data.packing={packing}", "data.packing_window=4", "optimizer.plugin=adamw")
    experiment.resume_at(experiment.copy(), 5)


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_shards_of_a_hub(tmp_path: Path, packing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed where nothing of the data has been fetched yet, while they arrive, and with all of them there."""
    constants = pytest.importorskip("huggingface_hub.constants")
    published = tmp_path / "published"
    published.mkdir()
    for shard in range(5):
        pq.write_table(pa.table({"text": words(40, seed=shard)}), published / f"shard_{shard:05d}.parquet")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    with serve(published, "someone/texts") as server:
        address = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)  # as if HF_ENDPOINT were set
        monkeypatch.setattr(constants, "ENDPOINT", server.url)

        class OfHub(Experiment):
            def run(self, runs: Path, *more: str):  # type: ignore[no-untyped-def]
                with_source(self.file, 'plugin = "hub_parquet"\nrepo = "someone/texts"\nshards = 4\nworkers = 1')
                return super().run(runs, *more)

        monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path / "home"))
        experiment = OfHub(tmp_path, f"data.packing={packing}", "data.packing_window=4", "optimizer.plugin=adamw")
        run = experiment.copy()
        experiment.resume_at(run, 7)
        monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path / "another"))
        server.requests.clear()
        experiment.resume_at(run, 5)
        assert any("shard_" in request for request in server.requests)


# ------------------------------------------------------------------------------------------------------------- moments


@pytest.mark.parametrize("packing", [(), BEST_FIT], ids=["stream", "best_fit"])
def test_from_every_step_of_several_epochs(tmp_path: Path, packing: tuple[str, ...]) -> None:
    """In the middle of an epoch, at its end, and just after."""
    experiment = Experiment(tmp_path, *packing, "data.cache=true", train=6)
    epochs = metrics(experiment.whole, "train/epoch")
    assert epochs[STEPS - 1] > 3
    run = experiment.copy()
    experiment.resume_at(run, *reversed(range(1, STEPS)))


@pytest.mark.parametrize("reached", ["nothing", "bpb", "all"])
def test_around_the_evaluations_of_a_step(tmp_path: Path, reached: str) -> None:
    """Killed when step 6 was saved, and had been evaluated not at all, by one, by both."""
    experiment = Experiment(tmp_path)
    run = experiment.copy()
    forget(run, 6)
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    records = ledger(run)
    wanted = {"nothing": (), "bpb": ("bpb",), "all": ("bpb", "samples")}[reached]
    kept = [
        line
        for line, record in zip(lines, records, strict=True)
        if record["step"] < 6 or (record["step"] == 6 and record.get("evaluator") in wanted)
    ]
    (run / "metrics.jsonl").write_bytes(b"".join(kept))
    experiment.resume_at(run, 6)
    assert metrics(run, "samples/0") == metrics(experiment.whole, "samples/0")
    assert [r.get("evaluator") for r in ledger(run)] == [r.get("evaluator") for r in records]


STOPS = """
import os, signal
from pathlib import Path
from nanochat_core import Evaluation, Evaluator

@attrs.frozen
class Where:
    directory: str
    at: tuple[int, ...]

class Stops(Evaluator):
    '''The first time it comes to one of the steps, it has the process told to stop.'''
    def __init__(self, config, context): self.config = config
    def evaluate(self, model, step):
        told = Path(self.config.directory, str(step))
        if step in self.config.at and not told.exists():
            told.touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return Evaluation({"val/step": float(step)})

@hookimpl
def nanochat_register_evaluators(registry):
    registry.add("stops", config=Where, factory="made_up.plugin:Stops", defaults={"every": 1, "at_start": True})
"""


def test_stopped_again_and_again(tmp_path: Path, site: Site) -> None:
    """By signals, at the start, in steps that would not be saved, and at the end."""
    site.add("made-up", STOPS)
    (tmp_path / "told").mkdir()
    stops = ("evaluators.stops.plugin=stops", f"evaluators.stops.directory={tmp_path / 'told'}")
    at = (0, 1, 5, 6, 11, STEPS)
    experiment = Experiment(tmp_path, *stops, "evaluators.stops.at=[]", "checkpoint.save_every=4", *BEST_FIT, train=6)
    runs, codes = tmp_path / "stopped", []
    while not codes or codes[-1] != 0:
        result = experiment.run(runs, "--resume", "auto", "--set", f"evaluators.stops.at={list(at)}")
        assert result.code in (0, 75), result.err
        codes.append(result.code)
    assert codes == [75] * len(at) + [0]
    run = only_run(runs)
    assert_same_end(run, experiment.whole)
    assert metrics(run, "val/step") == {step: float(step) for step in range(STEPS + 1)}


# ------------------------------------------------------------------------------------------------------------ compiled


@pytest.fixture(scope="module")
def compiled_code(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The cache of machine code, which all runs of the test share."""
    return os.environ.get("TORCHINDUCTOR_CACHE_DIR") or str(tmp_path_factory.mktemp("compiled"))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled(tmp_path: Path, compiled_code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", compiled_code)
    experiment = Experiment(tmp_path, "train.compile=true", "train.dtype=bfloat16", *BEST_FIT)
    assert "compile = true" in (experiment.whole / "experiment.toml").read_text()
    experiment.resume_at(experiment.copy(), 7, 3)
