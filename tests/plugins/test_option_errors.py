"""Whatever a plugin says of one of its options, it is told with file, line and the option's whole key, once."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from helpers.core_bundle import write_bundle

from nanochat_core import NanochatError, TokenizerContext, World
from nanochat_core.config.load import LoadedExperiment, load
from nanochat_core.data.sources import build_source
from nanochat_core.data.tokenizer_cache import build_tokenizer
from nanochat_core.distributed.guarded import EvaluationWorld
from nanochat_core.evaluation.build import build_evaluators
from nanochat_core.evaluation.evaluate import EvaluationFailed, evaluate
from nanochat_core.planning.build import build_model, optimizer_context
from nanochat_core.plugins.discovery import load_plugins

CPU = torch.device("cpu")
BASE = """
[tokenizer]
plugin = "bytes"
[data]
plugin = "python_docs"
[model]
plugin = "gpt"
depth = 1
aspect_ratio = 16
head_dim = 16
[optimizer]
plugin = "adamw"
[train]
max_seq_len = 16
device_batch_size = 2
dtype = "float32"
"""
DOCUMENTS = ["a few words of text", "and a few more"]
CASES = [  # table, plugin, the option at fault, other options
    ("data", "jsonl", 'path = "nowhere"', ""),
    ("data", "jsonl", 'val_path = "nowhere"', 'path = "two.jsonl"'),
    ("data", "jsonl", 'on_error = "fail"', 'path = "odd.jsonl"\nval_fraction = 0.5'),
    ("data", "text", 'path = "nowhere"', ""),
    ("data", "text", 'path = "junk"', ""),
    ("data", "parquet", 'path = "nowhere"', ""),
    ("data", "parquet", 'text_column = "words"', 'path = "texts.parquet"\nval_fraction = 0.5'),
    ("data", "fineweb_edu", "shards = 99999", ""),
    ("data", "climbmix", "shards = 99999", ""),
    ("tokenizer", "bpe", 'pattern = "("', ""),
    ("tokenizer", "bpe", "vocab_size = 5000", ""),
    ("tokenizer", "bpe", 'encoder = "gigatoken"', "vocab_size = 265\npattern = '(?s:.)'"),
    ("tokenizer", "sentencepiece", 'model_file = "junk"', ""),
    ("tokenizer", "sentencepiece", "vocab_size = 9000", ""),
    ("tokenizer", "tiktoken", 'encoding = "gpt0"', ""),
    ("tokenizer", "tiktoken", 'path = "junk"', "pattern = '(?s:.)'"),
    ("tokenizer", "huggingface", 'path = "junk"', ""),
    ("tokenizer", "hf", 'path = "junk"', ""),
    ("model", "gpt", "vocab_size = 100", "depth = 1"),
    ("model", "hf", 'path = "junk"', ""),
    ("optimizer", "muon_adamw", 'matrix_weight_decay_scale = "auto"', ""),
    ("evaluators", "core", 'bundle = "nowhere"', 'name = "mine"'),
    ("evaluators", "core", 'tasks = ["arc_odd"]', 'name = "mine"\nbundle = "bundle"'),
    ("evaluators", "core", 'bundle = "broken"', 'name = "mine"'),
    ("evaluators", "bpb", 'sets = [{ name = "none", path = "empty.txt" }]', 'name = "mine"\nsplit = "none"'),
    ("evaluators", "lm_eval", 'tasks = ["no_such_task"]', 'name = "mine"'),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    directory = tmp_path_factory.mktemp("files")
    (directory / "base.toml").write_text(BASE)
    (directory / "junk").write_text("just junk\n")
    (directory / "empty.txt").write_text("")
    (directory / "two.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (directory / "odd.jsonl").write_text('no JSON\n{"text": "one"}\n' * 3)
    pq.write_table(pa.table({"text": DOCUMENTS}), directory / "texts.parquet")
    write_bundle(directory / "bundle")
    write_bundle(directory / "broken")
    for shard in (directory / "broken").rglob("arc.jsonl"):
        shard.write_text("no JSON\n" + json.dumps({"query": "?"}) + "\n")
    return directory


def provoke(loaded: LoadedExperiment, table: str, directory: Path) -> None:
    """Use the part of the experiment that ``table`` describes until it raises."""
    experiment, world = loaded.experiment, World(0, 1, CPU)
    if table == "data":
        list(build_source(experiment.data).documents("train"))
    elif table == "tokenizer":
        experiment.tokenizer.build(TokenizerContext(documents=lambda: DOCUMENTS))
    else:
        tokenizer = build_tokenizer(experiment.tokenizer)
        model = build_model(experiment.model, experiment.train, tokenizer.vocab_size, CPU, for_training=True)
        if table == "optimizer":
            experiment.optimizer.build(optimizer_context(model, world, 256, 10, None)).resolved_options()
        guarded = EvaluationWorld.of(world)
        source = build_source(experiment.data)
        (built,) = build_evaluators(
            experiment.evaluators, lambda: source, source.fingerprint, tokenizer, experiment, guarded, directory
        )
        evaluate(built.choice, built.evaluator, model, torch.float32, 0, guarded)


@pytest.mark.parametrize(("table", "plugin", "bad", "more"), CASES, ids=lambda text: text.split(" = ")[0])
def test_an_option_at_fault_is_named_with_its_place(
    table: str, plugin: str, bad: str, more: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    entry = load_plugins()[{"data": "data_source", "evaluators": "evaluator"}.get(table, table)].get(plugin)  # type: ignore[index]
    assert entry is not None
    if entry.missing() or (plugin == "lm_eval" and importlib.util.find_spec("lm_eval") is None):
        pytest.skip(f"{', '.join(entry.missing())} is not installed")
    head = "[[evaluators]]" if table == "evaluators" else f"[{table}]"
    file = tmp_path / "x.toml"
    file.write_text(f'extends = "{files / "base.toml"}"\n{head}\nplugin = "{plugin}"\n{bad}\n{more}\n')
    loaded = load(file, (), load_plugins())
    with pytest.raises((NanochatError, EvaluationFailed)) as caught:
        provoke(loaded, table, tmp_path)
    key = f"{table}{'.mine' if table == 'evaluators' else ''}.{bad.partition(' ')[0]}"
    said = str(caught.value).removeprefix(f"{type(caught.value.__cause__).__name__}: ")
    assert said.startswith(f"{file}:4: {key}: ")
    assert said.count(f"{key}: ") == 1
