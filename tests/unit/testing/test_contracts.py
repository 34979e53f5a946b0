"""The contract checks: our own plugins pass them, and each notices a plugin that breaks its contract."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from helpers.core_bundle import write_bundle
from helpers.hub_server import serve
from helpers.lm_eval_tasks import write_task
from helpers.recipes import MODERN_MUON
from helpers.support import ROOT
from torch import nn
from torch.utils.checkpoint import checkpoint

from nanochat_core import (
    DataContext,
    DataSource,
    Evaluation,
    Evaluator,
    Logger,
    LoggerContext,
    Model,
    Multipliers,
    TorchOptimizer,
)
from nanochat_core.plugins.discovery import load_plugins
from nanochat_core.testing import check_data_source, check_evaluator, check_logger, check_model, check_optimizer
from nanochat_csv.config import CSVConfig
from nanochat_csv.logger import CSV
from nanochat_parquet.hub import Hub
from nanochat_parquet.hub_source import HubSource, numbered

HUB = ("climbmix", "fineweb_edu", "hub_parquet")


def entry(kind: str, name: str, **options: Any) -> tuple[Callable[[Any, Any], Any], Any]:
    found = load_plugins()[kind].get(name)  # type: ignore[index]
    assert found is not None
    if found.missing():
        pytest.skip(f"needs {found.missing()}")
    return found.load(), found.config(**options)


# -- ours


# The tests of each tokenizer run its checks; the other kinds are here.
TOKENIZERS = ("bpe", "bytes", "huggingface", "sentencepiece", "tiktoken")
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
    for kind, registry in load_plugins().registries.items():
        ours = {entry.name for entry in registry.entries if entry.distribution == "nanochat-core"} - set(FOREIGN)
        assert ours == set(checked[kind]), kind
    for name in TOKENIZERS:
        assert "check_tokenizer(build, " in (ROOT / "tests" / "plugins" / f"test_{name}.py").read_text()


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


# -- broken ones


class Good(Model):
    """An embedding, a running mean, a head."""

    def __init__(self, config: object, context: Any) -> None:
        super().__init__()
        self.vocab_size, self.hidden_size = context.vocab_size, 8
        self.embedding = nn.Embedding(context.vocab_size, 8)
        self.matrix = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, context.vocab_size, bias=False)

    def hidden(self, ids_BT: Any, cache: Any = None) -> Any:
        x_BTD = self.embedding(ids_BT)
        count_T1 = torch.arange(1, ids_BT.shape[1] + 1)[:, None]
        return x_BTD + torch.tanh(self.matrix(x_BTD.cumsum(1) / count_T1))

    def logits(self, hidden_ND: Any) -> Any:
        return self.head(hidden_ND).float()


class SeesAhead(Good):
    def hidden(self, ids_BT: Any, cache: Any = None) -> Any:
        return super().hidden(ids_BT) + self.embedding(ids_BT).mean(1, keepdim=True)


class MixesRows(Good):
    def hidden(self, ids_BT: Any, cache: Any = None) -> Any:
        return super().hidden(ids_BT) - self.embedding(ids_BT).mean(0, keepdim=True)


class HalfLogits(Good):
    def logits(self, hidden_ND: Any) -> Any:
        return self.head(hidden_ND).bfloat16()


class WrongLoss(Good):
    def forward(self, ids_BT: Any, targets_BT: Any, reduction: Any = "sum") -> Any:
        return super().forward(ids_BT, targets_BT, reduction) / 2


class Unused(Good):
    def __init__(self, config: object, context: Any) -> None:
        super().__init__(config, context)
        self.unused = nn.Parameter(torch.ones(3))


class OwnRoles(Good):
    def parameter_roles(self) -> dict[str, str]:
        return {**super().parameter_roles(), "matrix.weight": "body"}


class Forgetful(Good):
    def __init__(self, config: object, context: Any) -> None:
        super().__init__(config, context)
        self.offset = 0.0

    def forward(self, ids_BT: Any, targets_BT: Any, reduction: Any = "sum") -> Any:
        self.offset += 0.1
        return super().forward(ids_BT, targets_BT, reduction)

    def logits(self, hidden_ND: Any) -> Any:
        return super().logits(hidden_ND) * (1 + self.offset)


class Unseeded(Good):
    def __init__(self, config: object, context: Any) -> None:
        super().__init__(config, context)
        with torch.no_grad():
            self.head.weight.normal_(generator=torch.Generator().manual_seed(torch.seed() % 2**31))


class Checkpointed(Good):
    """Its embedding is dropped out, and computed again in the backward pass."""

    again = False

    def hidden(self, ids_BT: Any, cache: Any = None) -> Any:
        return checkpoint(self.dropped, ids_BT, use_reentrant=False) if self.again else self.dropped(ids_BT)

    def dropped(self, ids_BT: Any) -> Any:
        return nn.functional.dropout(super().hidden(ids_BT), 0.2, self.training)

    def checkpoint_activations(self) -> None:
        self.again = True


class LosesGradients(Checkpointed):
    def hidden(self, ids_BT: Any, cache: Any = None) -> Any:
        return super().hidden(ids_BT).detach() if self.again else super().hidden(ids_BT)


class OtherFunction(Checkpointed):
    def dropped(self, ids_BT: Any) -> Any:
        return super().dropped(ids_BT) * (0.9 if self.again else 1)


def test_a_good_model() -> None:
    check_model(Good, None)
    check_model(Checkpointed, None)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (SeesAhead, "a position sees tokens that come after it"),
        (MixesRows, "a row depends on the other rows"),
        (HalfLogits, "logits must be float32"),
        (WrongLoss, "is not the cross-entropy"),
        (Unused, "parameter unused gets no gradient"),
        (OwnRoles, "has role 'body'"),
        (Forgetful, "saved and loaded, it gives different logits"),
        (Unseeded, "the same seed gives different weights"),
        (LosesGradients, r"checkpoint_activations changes the gradient of parameter embedding\.weight"),
        (OtherFunction, "checkpoint_activations changes the loss"),
    ],
)
def test_broken_models(model: Any, reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        check_model(model, None)


class SGD(TorchOptimizer):
    def __init__(self, config: object, context: Any) -> None:
        sgd = torch.optim.SGD(context.parameters.values(), lr=0.3, momentum=0.9)
        super().__init__(sgd, context.parameters, context.world, state_tensors=1)


class LosesMomentum(SGD):
    def state_dict(self) -> Any:
        return {name: torch.zeros_like(tensor) for name, tensor in super().state_dict().items()}


class IgnoresScale(SGD):
    def update(self, scale: float, multipliers: Multipliers) -> None:
        super().update(1 / 64, multipliers)


class IgnoresRate(SGD):
    def update(self, scale: float, multipliers: Multipliers) -> None:
        super().update(scale, attrs.evolve(multipliers, lr=1.0))


class DiscardsNothing(SGD):
    def discard(self) -> None:
        pass


class WrongNorm(SGD):
    def reduce(self) -> Any:
        return super().reduce() * 2


class NeedsGradients(SGD):
    def reduce(self) -> Any:
        if any(p.grad is None for p in self.parameters.values()):
            raise ValueError("where are they?")
        return super().reduce()


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (LosesMomentum, "a resumed optimizer makes different updates"),
        (IgnoresScale, "apply scale to the gradients"),
        (IgnoresRate, "a learning-rate multiplier of 0 changes parameters"),
        (DiscardsNothing, "after discard the gradients are still there"),
        (WrongNorm, "reduce gives"),
        (NeedsGradients, "where are they"),
    ],
)
def test_broken_optimizers(optimizer: Any, reason: str) -> None:
    check_optimizer(SGD, None)
    with pytest.raises(AssertionError, match=reason):
        check_optimizer(optimizer, None)


class Lines(DataSource):
    def __init__(self, config: object, context: DataContext) -> None:
        self.context = context

    def documents(self, split: Any) -> Any:
        return [f"{split} {i}" for i in range(20)]


class NoValidation(Lines):
    def documents(self, split: Any) -> Any:
        return super().documents(split) if split == "train" else []


class Shuffles(Lines):
    count = 0

    def documents(self, split: Any) -> Any:
        Shuffles.count += 1
        return [f"{split} {i} {Shuffles.count}" for i in range(20)]


class Streams(Lines):
    def documents(self, split: Any) -> Any:
        return iter(super().documents(split))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (NoValidation, "val has no documents"),
        (Shuffles, "a second instance has different documents"),
        (Streams, "has no len"),
    ],
)
def test_broken_data_sources(source: Any, reason: str) -> None:
    check_data_source(Lines, None)
    with pytest.raises(AssertionError, match=reason):
        check_data_source(source, None)


class Finds(Evaluator):
    def __init__(self, config: Any, context: Any) -> None:
        self.config = config

    def evaluate(self, model: Model, step: int) -> Evaluation:
        with torch.enable_grad():
            return self.config(model, step)


def drifts(model: Model, step: int) -> Evaluation:
    with torch.no_grad():
        next(model.parameters()).add_(1)
    return Evaluation({"a": 1.0})


@pytest.mark.parametrize(
    ("find", "reason"),
    [
        (lambda model, step: Evaluation(), "neither metrics nor texts"),
        (lambda model, step: Evaluation({"a": torch.ones(())}), "must be a Python int or float"),
        (lambda model, step: Evaluation({"step": 1}), "names of the ledger"),
        (lambda model, step: Evaluation({"a": 1.0}, examples=[{"task": "x"}]), "an example needs task"),
        (lambda model, step: Evaluation({"a": float(torch.rand(()) + step)}), "of the same model has different values"),
        (drifts, "changes the model's parameters"),
    ],
)
def test_broken_evaluators(find: Any, reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        check_evaluator(Finds, find)


class Doubles(CSV):
    def log(self, record: Any) -> None:
        super().log(record)
        if record["step"] == 3:
            super().log(record)


class StartsAfresh(CSV):
    """Forgets at resume what was before."""

    def __init__(self, config: Any, context: LoggerContext) -> None:
        super().__init__(config, attrs.evolve(context, start_step=0))


class StumblesOverTexts(Logger):
    def __init__(self, config: Any, context: LoggerContext) -> None: ...

    def log(self, record: Any) -> None:
        [float(value) for name, value in record.items() if name != "evaluator"]


@pytest.mark.parametrize(
    ("logger", "reason"),
    [(Doubles, "told twice"), (StartsAfresh, "has steps"), (StumblesOverTexts, "could not convert")],
)
def test_broken_loggers(logger: Any, reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        check_logger(logger, CSVConfig(), read_csv)


def test_what_is_no_plugin_of_its_kind_is_said() -> None:
    for check in (check_model, check_optimizer, check_data_source, check_evaluator):
        with pytest.raises(AssertionError, match=r"must return a nanochat_core\."):
            check(lambda config, context: object(), None)  # type: ignore[operator]
