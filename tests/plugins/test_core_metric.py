"""CORE, against a plain reading of the recipe: one text a forward pass."""

from __future__ import annotations

import http.server
import itertools
import json
import re
import shutil
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from helpers.core_bundle import TASKS, examples, plain_reading, write_bundle
from helpers.support import Trained, call

from nanochat_core import ConfigError, DataError, Evaluation, EvaluatorContext, Model, ModelContext, Tokenizer, World
from nanochat_core.data.tokenizer_cache import build_tokenizer
from nanochat_core.evaluation.trained_model import load_trained
from nanochat_core.plugins.choice import Choice, EntryKeys
from nanochat_core.plugins.discovery import load_plugins
from nanochat_dclm_core import bundle as bundles
from nanochat_dclm_core.evaluator import aggregate, centered, table

CPU = torch.device("cpu")
SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "eval_bundle"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    entry = load_plugins()["tokenizer"].get("bytes")
    assert entry is not None
    return build_tokenizer(Choice(EntryKeys("bytes"), entry, entry.config()))


def random_model(vocab_size: int, T: int = 32, seed: int = 0, **options: Any) -> Model:
    entry = load_plugins()["model"].get("gpt")
    assert entry is not None
    config = entry.config(**({"depth": 2, "aspect_ratio": 16, "head_dim": 16} | options))
    torch.manual_seed(seed)
    model = entry.load()(config, ModelContext(vocab_size, T, CPU, torch.float32))
    for parameter in model.parameters():  # as built, the head is zero and everything ties
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def core(
    tokenizer: Tokenizer, T: int = 64, world: World | None = None, context: dict[str, Any] | None = None, **options: Any
) -> Any:
    entry = load_plugins()["evaluator"].get("core")
    assert entry is not None
    made = EvaluatorContext(tokenizer, world or World(0, 1, CPU), T, 2, lambda split, tokens: iter(()))
    return entry.load()(entry.config(**options), attrs.evolve(made, **(context or {})))


def check(evaluation: Evaluation, model: Model, tokenizer: Tokenizer, limit: int, max_len: int) -> None:
    for task in TASKS:
        rows = [row for row in evaluation.examples if row["task"] == task["label"]]
        plain = plain_reading(model, tokenizer, task, examples()[task["label"]], limit, max_len)
        assert [row["chosen"] for row in rows] == [chosen for chosen, _, _ in plain], task["label"]
        assert [row["value"] for row in rows] == [float(right) for _, right, _ in plain], task["label"]
        for row, (_, _, losses) in zip(rows, plain, strict=True):
            assert row["scores"] == pytest.approx(losses, abs=1e-4)
        accuracy = sum(right for _, right, _ in plain) / len(plain)
        assert evaluation.facts["accuracy"][task["label"]] == pytest.approx(accuracy)


@pytest.mark.parametrize(("T", "max_len", "batch_tokens"), [
    (64, "unlimited", "auto"), (512, "model", 300), (40, "model", 1), (7, "model", 64), (9, "unlimited", 1000),
])  # fmt: skip
def test_same_as_a_plain_reading(bundle, tokenizer, T, max_len, batch_tokens):
    model = random_model(tokenizer.vocab_size, T, seed=T)
    evaluation = core(tokenizer, T, bundle=bundle, max_len=max_len, batch_tokens=batch_tokens).evaluate(model, 0)
    check(evaluation, model, tokenizer, 500, T if max_len == "model" else 10 * T)


def test_same_for_a_trained_model(bundle, trained: Trained):
    ours = load_trained("tiny", trained.runs, CPU, load_plugins())
    evaluation = core(ours.tokenizer, 32, bundle=bundle, max_per_task=5).evaluate(ours.model, 0)
    check(evaluation, ours.model, ours.tokenizer, 5, 320)


def test_more_tokenizers_than_bytes(bundle, tmp_path):
    """Tokens that reach across the border of prompt and answer."""
    entry = load_plugins()["tokenizer"].get("bpe")
    assert entry is not None
    from nanochat_core import TokenizerContext

    texts = [json.dumps(example) for task in examples().values() for example in task] * 20
    made = entry.load()(entry.config(vocab_size=390), TokenizerContext(documents=lambda: texts))
    model = random_model(made.vocab_size)
    check(core(made, bundle=bundle).evaluate(model, 0), model, made, 500, 640)


def test_metrics_csv_and_facts(bundle, tokenizer):
    evaluation = core(tokenizer, bundle=bundle, max_per_task=6).evaluate(random_model(tokenizer.vocab_size), 0)
    accuracy = evaluation.facts["accuracy"]
    assert evaluation.metrics["core/arc_easy"] == pytest.approx((accuracy["arc_easy"] - 0.25) / 0.75)
    assert evaluation.metrics["core/jeopardy"] == accuracy["jeopardy"]
    assert "core_metric" not in evaluation.metrics
    scores = [evaluation.metrics[f"core/{t['label']}"] for t in TASKS]
    assert evaluation.metrics["core/partial_mean"] == pytest.approx(sum(scores) / 4)
    assert len(evaluation.facts["missing_tasks"]) == 18
    assert any("18 of CORE's 22 tasks are not in the bundle: hellaswag_zeroshot" in note for note in evaluation.notes)
    lines = evaluation.files["core.csv"].splitlines()
    assert lines[0] == "Task,Accuracy,Centered"
    assert lines[1] == f"arc_easy,{accuracy['arc_easy']:.6f},{scores[0]:.6f}"
    assert lines[-1].startswith("partial mean,,")
    assert {row["task"] for row in evaluation.examples} == {t["label"] for t in TASKS}
    assert len({row["example"] for row in evaluation.examples if row["task"] == "arc_easy"}) == 6


def test_ties_go_to_the_first(bundle, tokenizer):
    model = random_model(tokenizer.vocab_size)
    torch.nn.init.zeros_(model.head.weight)  # every token is as likely as any other
    rows = core(tokenizer, bundle=bundle).evaluate(model, 0).examples
    assert {row["chosen"] for row in rows if row["task"] != "jeopardy"} == {0}


def test_choices_decided_by_little_are_counted(bundle, tokenizer):
    model = random_model(tokenizer.vocab_size)
    few = core(tokenizer, bundle=bundle).evaluate(model, 0)
    with torch.no_grad():
        model.head.weight *= 1e-5  # almost ties
    many = core(tokenizer, bundle=bundle).evaluate(model, 0)
    assert sum(few.facts["close"].values()) < 5 < sum(many.facts["close"].values())
    assert any("decided by less than 0.0001" in note for note in many.notes)
    twins = [row for row in many.examples if len(set(row["scores"])) == 1 and len(row["scores"]) > 1]
    assert twins  # identical choices tie exactly, which is nothing to worry about
    assert not any(row["close"] for row in twins)


def test_time_budget_gives_a_marked_part(bundle, tokenizer):
    clock = itertools.chain([100.0] * 4, itertools.repeat(-1.0))
    evaluator = core(tokenizer, bundle=bundle, context={"time_left": lambda: next(clock)})
    evaluation = evaluator.evaluate(random_model(tokenizer.vocab_size), 0)
    assert 0 < len(evaluation.facts["unfinished_tasks"]) < 4
    assert "core_metric" not in evaluation.metrics
    assert any(note.startswith("time_budget ended before: ") for note in evaluation.notes)
    assert all(f"core/{label}" not in evaluation.metrics for label in evaluation.facts["unfinished_tasks"])


def test_an_interruption_costs_one_task(bundle, tokenizer, tmp_path):
    class Interrupted(Exception): ...

    model = random_model(tokenizer.vocab_size)
    whole = core(tokenizer, bundle=bundle).evaluate(model, 3)
    calls = 0

    def stop() -> float:
        nonlocal calls
        calls += 1
        if calls > 6:
            raise Interrupted
        return 100.0

    with pytest.raises(Interrupted):
        core(tokenizer, bundle=bundle, context={"directory": tmp_path, "time_left": stop}).evaluate(model, 3)
    kept = tmp_path / "core_partial.jsonl"
    done = len(kept.read_text().splitlines()) - 1
    assert 0 < done < 4
    with kept.open("a") as file:
        file.write('{"task": "half a li')
    again: list[int] = []
    context = {"directory": tmp_path, "time_left": lambda: again.append(1) or 100.0}
    resumed = core(tokenizer, bundle=bundle, context=context).evaluate(model, 3)
    assert resumed.examples == whole.examples
    assert len(again) == 2 * (4 - done)
    assert not kept.exists()


def test_partial_results_of_another_model_are_not_taken(bundle, tokenizer, tmp_path):
    model, other = random_model(tokenizer.vocab_size), random_model(tokenizer.vocab_size, seed=1)
    clock = itertools.chain([100.0] * 4, itertools.repeat(-1.0))
    context = {"directory": tmp_path, "time_left": lambda: next(clock)}
    core(tokenizer, bundle=bundle, context=context).evaluate(model, 3)
    assert (tmp_path / "core_partial.jsonl").exists()
    found = core(tokenizer, bundle=bundle, context={"directory": tmp_path}).evaluate(other, 3)
    assert found.examples == core(tokenizer, bundle=bundle).evaluate(other, 3).examples


# -------------------------------------------------------------------------------------------------------- bundles


def make_zip(bundle: Path, file: Path, prefix: str = "eval_bundle/") -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(bundle.rglob("*")):
            if path.is_file():
                archive.write(path, prefix + str(path.relative_to(bundle)))
    return file


def test_a_zip_is_as_good_as_a_directory(bundle, tokenizer, tmp_path):
    model = random_model(tokenizer.vocab_size)
    expected = core(tokenizer, bundle=bundle).evaluate(model, 0)
    for prefix in ("eval_bundle/", ""):
        found = core(tokenizer, bundle=make_zip(bundle, tmp_path / "b.zip", prefix)).evaluate(model, 0)
        assert found.examples == expected.examples
        assert found.metrics == expected.metrics


@pytest.fixture
def server(tmp_path) -> Iterator[tuple[Path, str, list[str]]]:
    """A directory, the address at which it is served, and the requests."""
    root, requests = tmp_path / "served", []
    root.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(root))

        def log_message(self, *_: Any) -> None:
            requests.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield root, f"http://127.0.0.1:{made.server_address[1]}/eval_bundle.zip", requests
        made.shutdown()


def test_downloaded_once_and_whole(bundle, server, tmp_path):
    root, url, requests = server
    make_zip(bundle, root / "eval_bundle.zip")
    cache = tmp_path / "cache"
    threads = [threading.Thread(target=bundles.download, args=(cache, url)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(requests) == 1
    assert [t.label for t in bundles.open_bundle(None, cache, url).tasks] == [t["label"] for t in TASKS]
    assert len(requests) == 1
    assert sorted(p.name for p in cache.iterdir()) == ["eval_bundle.lock", "eval_bundle.zip"]


@pytest.mark.parametrize("damage", ["cut", "changed", "other", "absent"])
def test_a_damaged_download_leaves_nothing(bundle, server, tmp_path, damage):
    root, url, _ = server
    content = make_zip(bundle, root / "eval_bundle.zip").read_bytes()
    at = content.index(b"arc.jsonl") + 40
    broken = {
        "cut": content[:-100], "changed": content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :], "other": b"hi",
    }  # fmt: skip
    if damage == "absent":
        (root / "eval_bundle.zip").unlink()
    else:
        (root / "eval_bundle.zip").write_bytes(broken[damage])
    with pytest.raises(DataError, match="bundle"):
        bundles.open_bundle(None, tmp_path / "cache", url)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["eval_bundle.lock"]


def test_what_is_wrong_with_a_bundle_is_named(bundle, tokenizer, tmp_path):
    model = random_model(tokenizer.vocab_size)
    with pytest.raises(DataError, match="neither a directory nor a zip"):
        core(tokenizer, bundle=tmp_path / "none").evaluate(model, 0)
    with pytest.raises(ConfigError, match="hellaswag not in the bundle; its tasks are arc_easy, copa"):
        core(tokenizer, bundle=bundle, tasks=("hellaswag",)).evaluate(model, 0)
    broken = write_bundle(tmp_path / "broken")
    file = broken / "eval_data" / "winograd.jsonl"
    file.write_text(file.read_text().replace('"gold": 1', '"gold": 2', 1))
    with pytest.raises(DataError, match=r"winograd.jsonl:2: gold must be the index"):
        core(tokenizer, bundle=broken).evaluate(model, 0)
    file.unlink()
    with pytest.raises(DataError, match=r"winograd.jsonl can't be read"):
        core(tokenizer, bundle=broken).evaluate(model, 0)
    evaluation = core(tokenizer, bundle=broken, tasks=("copa", "arc_easy")).evaluate(model, 0)
    assert evaluation.facts["left_out_tasks"] == ["winograd", "jeopardy"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the bundle with real tasks is not here")
def test_the_real_bundle(tokenizer):
    evaluator = core(tokenizer, 256, bundle=SHARED, max_per_task=12, tasks=("copa", "winograd", "bigbench_operators"))
    evaluation = evaluator.evaluate(random_model(tokenizer.vocab_size, 256), 0)
    assert evaluation.settings["baselines"] == "dclm-v2"
    assert len(evaluation.facts["missing_tasks"]) == 9
    assert len(evaluation.facts["left_out_tasks"]) == 10
    assert evaluation.facts["examples"] == {"copa": 12, "winograd": 12, "bigbench_operators": 12}


def test_which_baselines():
    ours = {"commonsense_qa": 40.3, "agi_eval_lsat_ar": 25.0, "bigbench_language_identification": 25.0, "copa": 50.0}
    assert bundles.baselines_version(ours) == "dclm-v2"
    other = ours | {"commonsense_qa": 20.0, "agi_eval_lsat_ar": 20.0, "bigbench_language_identification": 9.1}
    assert bundles.baselines_version(other) == "nanochat"
    assert bundles.baselines_version(ours | {"commonsense_qa": 1.0}) == "unknown"
    assert bundles.baselines_version({}) == "unknown"


# ----------------------------------------------------------------------------------------------- published figures

# Centered accuracies in reports of nanochat runs (October 2025, March 2026), and the CORE metric they state.
PUBLISHED = [
    (0.2206, [0.2631, 0.1138, 0.5169, 0.5449, 0.1331, 0.3400, 0.1155, 0.3711, 0.1253, 0.3674, 0.2707, 0.3407, 0.0750,
              0.1240, 0.0924, 0.3432, 0.1476, 0.0000, 0.2451, 0.2096, -0.0671, 0.1817]),
    (0.2621, [0.3993, 0.0827, 0.4536, 0.5746, 0.1763, 0.2600, 0.0561, 0.4897, 0.2347, 0.4427, 0.4086, 0.3187, 0.1460,
              0.1470, 0.1087, 0.4424, 0.1714, 0.0625, 0.3865, 0.3150, -0.0856, 0.1745]),
]  # fmt: skip
# Examples and baseline (percent, of "nanochat") of tasks whose accuracy must be a whole number of examples.
SIZES = {
    "arc_easy": (2376, 25), "arc_challenge": (1172, 25), "copa": (100, 50), "commonsense_qa": (1221, 20),
    "piqa": (1838, 50), "openbook_qa": (500, 25), "winograd": (273, 50), "winogrande": (1267, 50),
    "agi_eval_lsat_ar": (230, 20), "bigbench_cs_algorithms": (1320, 0), "bigbench_operators": (210, 0),
    "bigbench_repeat_copy_logic": (32, 0), "boolq": (3270, 62),
}  # fmt: skip


@pytest.mark.parametrize(("stated", "published"), PUBLISHED)
def test_published_aggregates(stated, published):
    """From accuracies (counts of right answers) to centered ones, and to the mean."""
    scores = dict(zip(bundles.CORE_TASKS, published, strict=True))
    for label, (count, baseline) in SIZES.items():
        accuracy = scores[label] * (1 - baseline / 100) + baseline / 100
        right = round(accuracy * count)
        assert centered(right / count, baseline) == pytest.approx(scores[label], abs=6e-5), label
        scores[label] = centered(right / count, baseline)
    name, mean = aggregate(scores)
    assert name == "core_metric"
    assert mean == pytest.approx(stated, abs=1e-4)
    assert table(scores, scores).splitlines()[-1] == f"CORE,,{mean:.6f}"


def test_entry():
    entry = load_plugins()["evaluator"].get("core")
    assert entry is not None
    assert entry.defaults == {"every": 2000, "at_start": False, "at_end": True}
    assert entry.aliases == {"core_metric_every": "every", "core_metric_max_per_task": "max_per_task"}
    assert entry.config().max_per_task == 500
    assert call("plugins", "evaluator/core").code == 0


EXAMPLE = {
    "multiple_choice": {"query": "a", "choices": ["b", "c"], "gold": 0},
    "schema": {"context_options": ["a", "b"], "continuation": "c", "gold": 1},
    "language_modeling": {"context": "a", "continuation": "b"},
}


@pytest.mark.parametrize(
    ("kind", "field", "value", "problem"),
    [
        ("multiple_choice", "query", None, "query must be a text, not None"),
        ("multiple_choice", "choices", [None, "b"], r"choices\[0\] must be a text"),
        ("multiple_choice", "choices", "ab", "choices must be a list of texts"),
        ("multiple_choice", "choices", [], "choices must be a list of texts"),
        ("multiple_choice", "gold", True, "gold must be the index of one of 2 choices, not True"),
        ("schema", "context_options", ["a", 5], r"context_options\[1\] must be a text"),
        ("schema", "gold", 2, "gold must be the index"),
        ("language_modeling", "continuation", 5, "continuation must be a text, not 5"),
    ],
)
def test_fields_of_examples(kind: Any, field: str, value: object, problem: str) -> None:
    lines = [EXAMPLE[kind], {**EXAMPLE[kind], field: value}]
    data = "\n".join(map(json.dumps, lines)).encode()
    task = bundles.Task("mine", "mine.jsonl", kind, 0, " ", 0.0)
    opened = bundles.Bundle("there", lambda name: data, (task,), "unknown", "")
    with pytest.raises(DataError, match=rf"^bundle: there/eval_data/mine\.jsonl:2: {problem}"):
        opened.examples(task)


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        (r"num_fewshot:(\n  - .*| .*)", "num_fewshot: [1.5]", "num_fewshot must be a number"),
        (r"dataset_uri: \S+", "dataset_uri: ../../secret", "must not begin with a dot"),
        (r"label: \S+", "label: .x", "must not begin with a dot"),
        (r"label: \S+", "label: [&a [b], *a]", "aliases"),
        (r"icl_task_type: \S+", "continuation_delimiter: 5\n  icl_task_type: schema", "must be a text, not 5"),
    ],
)
def test_configurations(bundle: Path, tmp_path: Path, before: str, after: str, problem: str) -> None:
    shutil.copytree(bundle, tmp_path / "copy")
    file = tmp_path / "copy" / "core.yaml"
    text = file.read_text()
    assert re.search(before, text), text
    file.write_text(re.sub(before, after, text, count=1))
    with pytest.raises(DataError, match=rf"core\.yaml: .*{problem}"):
        bundles.open_bundle(tmp_path / "copy", tmp_path)


def test_a_file_of_a_zip_that_is_too_large(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "LARGEST_FILE", 100)
    for place in (bundle, make_zip(bundle, tmp_path / "b.zip")):
        with pytest.raises(DataError, match=r"^bundle: .*core\.yaml.* can't be read \(it has "):
            bundles.open_bundle(place, tmp_path)
