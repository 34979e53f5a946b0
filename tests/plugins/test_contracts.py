"""Every plugin of ours passes the contract check of its kind."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.core_bundle import write_bundle
from helpers.hub_server import serve
from helpers.lm_eval_tasks import write_task
from helpers.recipes import MODERN_MUON

from nanochat_core import DataContext, DataSource
from nanochat_core.plugins.discovery import load_plugins
from nanochat_core.testing import (
    check_data_source,
    check_evaluator,
    check_logger,
    check_model,
    check_optimizer,
    check_tokenizer,
)
from nanochat_parquet.hub import Hub
from nanochat_parquet.hub_source import HubSource, numbered

HUB = ("climbmix", "fineweb_edu", "hub_parquet")


def entry(kind: str, name: str, **options: Any) -> tuple[Callable[[Any, Any], Any], Any]:
    found = load_plugins()[kind].get(name)  # type: ignore[index]
    assert found is not None
    if found.missing():
        pytest.skip(f"needs {found.missing()}")
    return found.load(), found.config(**options)


TOKENIZERS: dict[str, dict[str, Any]] = {
    "bpe": {"vocab_size": 500}, "bytes": {}, "huggingface": {}, "sentencepiece": {"vocab_size": 500}, "tiktoken": {},
}  # fmt: skip
MODELS = {"gpt": {"depth": 2, "aspect_ratio": 16, "head_dim": 16}}
OPTIMIZERS = ("adamw", "muon_adamw")
DATA_SOURCES = ("climbmix", "fineweb_edu", "hub_parquet", "jsonl", "parquet", "python_docs", "text")
EVALUATORS = {
    "bpb": {"eval_tokens": 256}, "core": {"max_per_task": 4}, "lm_eval": {"tasks": ("quiz",)},
    "samples": {"prompts": ("ab", "c"), "max_new_tokens": 3},
}  # fmt: skip
LOGGERS = ("aim", "console", "csv", "tensorboard", "wandb")
FOREIGN = ("hf",)  # what transformers loads, for nanochat eval: nothing of it is ours to promise


def test_every_plugin_of_ours_is_checked() -> None:
    checked = {
        "tokenizer": TOKENIZERS, "model": MODELS, "optimizer": OPTIMIZERS, "data_source": DATA_SOURCES,
        "evaluator": EVALUATORS, "logger": LOGGERS,
    }  # fmt: skip
    plugins = load_plugins()
    gpt = plugins["model"].get("gpt")
    assert gpt is not None
    for kind, registry in plugins.registries.items():
        ours = {entry.name for entry in registry.entries if entry.distribution == gpt.distribution} - set(FOREIGN)
        assert ours == set(checked[kind]), kind


@pytest.mark.parametrize("name", TOKENIZERS)
def test_our_tokenizers(name: str, tmp_path: Path) -> None:
    places: dict[str, Any] = {}
    if name == "tiktoken":
        lines = (f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256))
        (tmp_path / "merges.tiktoken").write_text("".join(lines))
        places = {"path": tmp_path / "merges.tiktoken", "pattern": r"\s+|\S+"}
    if name == "huggingface":
        tokenizers = pytest.importorskip("tokenizers")
        byte_level = tokenizers.pre_tokenizers.ByteLevel
        made = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(byte_level.alphabet())}, []))
        made.pre_tokenizer, made.decoder = byte_level(add_prefix_space=False), tokenizers.decoders.ByteLevel()
        made.save(str(tmp_path / "tokenizer.json"))
        places = {"path": tmp_path / "tokenizer.json"}
    trained = "vocab_size" in TOKENIZERS[name]
    check_tokenizer(*entry("tokenizer", name, **TOKENIZERS[name], **places), *(() if trained else (list,)),
                    other_process=False)  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_our_models(name: str) -> None:
    check_model(*entry("model", name, **MODELS[name]))


@pytest.mark.parametrize(("name", "options"), [("adamw", {}), ("muon_adamw", {}), ("muon_adamw", MODERN_MUON)])
def test_our_optimizers(name: str, options: dict[str, Any]) -> None:
    check_optimizer(*entry("optimizer", name, **options))


def files_of(name: str, directory: Path, shards: Path) -> dict[str, Any]:
    """Options that point a data source to documents, which are written."""
    texts = [f"document {i}\n" + "word " * (i % 5) for i in range(60)]
    if name == "parquet":
        return {"path": shards}
    if name == "jsonl":
        (directory / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return {"path": str(directory), "val_fraction": 0.25}
    if name == "text":
        (directory / "a.txt").write_text("\n===\n".join(texts))
        return {"path": str(directory), "separator": "===", "val_fraction": 0.25}
    return {}


@pytest.mark.parametrize("name", [name for name in DATA_SOURCES if name not in HUB])
def test_our_data_sources(name: str, tmp_path: Path, shards: Path) -> None:
    check_data_source(*entry("data_source", name, **files_of(name, tmp_path, shards)))


@pytest.mark.parametrize("name", HUB)
def test_our_data_sources_of_the_hub(name: str, tmp_path: Path, shards: Path) -> None:
    _, config = entry("data_source", name, shards=1, **({"repo": "someone/texts"} if name == "hub_parquet" else {}))

    def build(config: Any, context: DataContext) -> DataSource:
        """As the factory does, from a hub on loopback that has two shards."""
        cache = context.cache_dir
        hub = Hub("someone/texts", config.revision, cache, endpoint=server.url, hub_cache=cache)
        return HubSource(hub, config, None if name == "hub_parquet" else numbered(2))

    with serve(shards, "someone/texts") as server:
        check_data_source(build, config)


@pytest.mark.parametrize("name", EVALUATORS)
def test_our_evaluators(name: str, tmp_path: Path) -> None:
    places: dict[str, Any] = {}
    if name == "core":
        places = {"bundle": write_bundle(tmp_path)}
    if name == "lm_eval":
        pytest.importorskip("lm_eval")
        places = {"include_path": write_task(tmp_path)}
    found = check_evaluator(*entry("evaluator", name, **EVALUATORS[name], **places))
    assert found.metrics or found.texts


def read_csv(run: Path) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    with (run / "csv" / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            steps = found.setdefault(row["name"], {})
            assert int(row["step"]) not in steps, "told twice"
            steps[int(row["step"])] = float(row["value"])
    return found


def read_tensorboard(run: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def read_aim(run: Path) -> dict[str, dict[int, float]]:
    import aim

    (found,) = aim.Repo(str(run.parents[1])).iter_runs()
    tables = {metric.name: metric.data.items_list() for metric in found.metrics()}
    return {name: dict(zip(steps, columns[0], strict=True)) for name, (steps, columns) in tables.items()}


@pytest.mark.parametrize(
    ("name", "read", "options"),
    [
        ("csv", read_csv, {}),
        ("tensorboard", read_tensorboard, {}),
        ("aim", read_aim, {"system_metrics": False}),
        ("wandb", None, {"mode": "offline", "system_metrics": False}),
        ("console", None, {}),
    ],
)
def test_our_loggers(name: str, read: Any, options: dict[str, Any]) -> None:
    check_logger(*entry("logger", name, **options), read)
