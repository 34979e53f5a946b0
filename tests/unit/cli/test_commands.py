"""The commands: show, plan, plugins, runs, sample, --help."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers.support import ROOT, Result, Site, Trained, call, spawn

import nanochat_core
from nanochat_core.hardware import devices
from nanochat_core.planning import autos

D20 = ROOT / "experiments" / "d20.toml"

# --------------------------------------------------------------------------------------------------------------- help

NO_TORCH = """
import sys
from nanochat_core.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    assert not ended.code
heavy = {"torch", "numpy", "pyarrow", "tqdm"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"], ["plugins"], ["runs"]])
def test_light_commands_import_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", NO_TORCH, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_help_names_every_command() -> None:
    result = call("--help")
    assert result.code == 0
    for command in ("run", "show", "plan", "plugins", "runs", "sample"):
        assert re.search(rf"^    {command} +\w", result.out, re.MULTILINE)
        described = call(command, "--help")
        assert described.code == 0
        assert f"usage: nanochat {command}" in described.out


def test_the_script_and_the_module_are_one_command() -> None:
    script = Path(sys.executable).with_name("nanochat")
    version = f"nanochat {nanochat_core.__version__}\n"
    assert spawn("--version").out == version
    if not script.exists():
        pytest.skip("nanochat is not installed as a command")
    assert subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout == version


# --------------------------------------------------------------------------------------------------------------- show


def shown(*arguments: object) -> dict[str, tuple[str, str]]:
    return rows_of(call("show", *arguments))


def rows_of(result: Result) -> dict[str, tuple[str, str]]:
    """Key to (value, origin)."""
    assert result.code == 0, result.err
    rows = {}
    for line in filter(None, result.out.splitlines()):
        text, _, origin = line.rpartition("  # ")
        key, _, value = text.strip().partition(" = ") if " = " in text else text.strip().partition(" ")
        assert origin, line
        rows[key] = (value, origin)
    return rows


def test_show_gives_every_value_with_its_origin(tiny: Path) -> None:
    rows = shown(tiny, "--set", "train.grad_clip=0.5", "--set", "train.dtype=auto", "--set", "evaluators.bpb.every=3")
    assert rows["model.depth"] == ("1", f"{tiny}:14")
    assert rows["model.softcap"] == ("15.0", "default")
    assert rows["train.grad_clip"] == ("0.5", "--set train.grad_clip=0.5")
    assert rows["evaluators.bpb.every"] == ("3", "--set evaluators.bpb.every=3")
    assert rows["evaluators.samples.prompts"] == ('["one, ", "two, "]', f"{tiny}:39")
    assert rows["train.target_flops"] == ("(unset)", "default")
    assert rows["run.tags"] == ("[]", "default")


@pytest.mark.parametrize(
    ("fast", "dtype", "reason"),
    [(True, "bfloat16", "this CPU has AMX or avx512_bf16"), (False, "float32", "this CPU has no fast bfloat16")],
)
def test_show_resolves_the_dtype_by_the_device(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, fast: bool, dtype: str, reason: str
) -> None:
    for module in (devices, autos):
        monkeypatch.setattr(module, "cpu_has_bf16", lambda: fast)
    value, origin = shown(tiny, "--set", "train.dtype=auto")["train.dtype"]
    assert value == f'"{dtype}"'
    assert origin.startswith(f"auto: {reason}")


def test_show_follows_extends(tiny: Path) -> None:
    child = tiny.with_name("child.toml")
    child.write_text('extends = "tiny.toml"\n[model]\nsoftcap = 0\n[[evaluators]]\nname = "samples"\nremove = true\n')
    rows = shown(child)
    assert rows["model.softcap"] == ("0.0", f"{child}:3")
    assert rows["model.depth"] == ("1", f"{tiny}:14")
    assert rows["run.name"] == ('"tiny"', f"{tiny}:3")
    assert not [key for key in rows if key.startswith("evaluators.samples")]


def test_an_experiment_can_be_shown_and_planned_before_its_data_source_is_there(tiny: Path, tmp_path: Path) -> None:
    tiny.write_text(re.sub(r'"parquet"\npath = .*', '"laion_books"', tiny.read_text()))
    missing = 'data.plugin: no data source plugin "laion_books" is installed'
    for command in ("show", "plan"):
        result = call(command, tiny)
        assert result.code == 0
        assert f"{tiny}:9: {missing}" in result.err
    result = call("run", tiny, "--runs-dir", tmp_path / "runs")
    assert result.code == 2
    assert missing in result.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("file", sorted((ROOT / "experiments").rglob("*.toml")), ids=lambda p: p.stem)
def test_every_shipped_experiment_is_sound(file: Path) -> None:
    result = call("show", file)
    rows = rows_of(result)
    missing = [line for line in result.err.splitlines() if line.startswith("missing")]
    missing = [line for line in missing if "its library is missing" not in line]  # Aim's, on a newer Python
    assert len(missing) == (file.stem == "decay")  # it is for the model of a guide, which is not installed
    for table, keys in tomllib.loads(file.read_text()).items():
        for key, value in keys.items() if isinstance(keys, dict) else ():
            shown_value, origin = rows[f"{table}.{key}"]
            if value == "auto" and origin.startswith("auto: "):
                continue  # resolved
            assert origin.startswith(f"{file}:")
            assert tomllib.loads(f"x = {shown_value}")["x"] == value


UNVERIFIED = """
@attrs.frozen
class Config:
    fast: bool | str = option("auto", "a fast way", unverified="never ran on a fast machine")
    plain: int = option(1, "a plain option")

@hookimpl
def nanochat_register_evaluators(registry):
    registry.add("made-up", config=Config, factory="made_up.plugin:Config")
"""


def test_what_never_ran_on_its_hardware_is_said(site: Site, tiny: Path) -> None:
    site.add("made-up", UNVERIFIED)
    text, chosen = "never ran on a fast machine", ("--set", "evaluators.it.plugin=made-up")
    assert f"      a fast way\n      unverified: {text}\n" in call("plugins", "evaluator/made-up").out
    for command, line in (
        ("show", rf"evaluators\.it\.fast = true +# --set evaluators\.it\.fast=true \(unverified: {text}\)"),
        ("plan", rf"  unverified +evaluators\.it\.fast: {text}"),
    ):
        assert text not in call(command, tiny, *chosen, "--set", "evaluators.it.plain=2").out
        said = call(command, tiny, *chosen, "--set", "evaluators.it.fast=true").out
        assert len(re.findall(f"(?m)^{line}$", said)) == 1


# --------------------------------------------------------------------------------------------------------------- plan


def test_plan_of_d20(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = call("plan", D20, "--nproc", "8", "--tok-per-sec", "1e6", "--set", "train.compile=true")
    assert result.code == 0, result.err
    lines = dict(re.findall(r"^  (\S.*?)(?::| {2,}) *(.*)$", result.out, re.MULTILINE))
    # width 1280; block matrices 20 x 12 x 1280^2, embedding and head 32768 x 1280 each
    assert lines["parameters"] == "477,102,080 (embedding 41,943,040, matrix 393,216,000, head 41,943,040)"
    assert lines["total batch size"] == "524,288 tokens per step"
    assert lines["accumulation steps"] == "1"
    steps = 477_102_080 * 20 // 524_288
    assert lines["steps"].startswith(f"{steps:,} (20 tokens x 477,102,080 parameters")
    assert lines["tokens"].startswith(f"{steps * 524_288:,}, tokens : params ratio 20.00")
    flops = 6 * (393_216_000 + 41_943_040) + 20 * 12 * 1280 * 2048
    assert lines["FLOPs per token"] == f"{flops:.4e}"
    assert lines["total FLOPs"] == f"{flops * steps * 524_288:.4e}"
    assert lines["memory"].startswith("about ")
    assert lines["time"] == "2.7 h of training at 1,000,000 tokens/s (given by --tok-per-sec)"


def test_plan_for_gpus_that_are_not_here(tiny: Path) -> None:
    more = ("--set", "train.dtype=auto", "--vary", "model.depth=1,2", "--mfu", "50")
    result = call("plan", tiny, "--device", "h100", "--nproc", "2", "--price", "24", *more)
    assert result.code == 0, result.err
    assert re.search(r"device +2 x H100, bfloat16", result.out)
    assert "(50% of 2 x 989 TFLOP/s, assumed; see --mfu)" in result.out
    assert "at 24 dollars per hour for all 2 devices" in result.out
    assert re.search(r"disk: 3 checkpoints of 0\.00 GiB", result.out)
    table = [line.split() for line in result.out[result.out.index("model.depth") :].splitlines()]
    assert [row[:3] for row in table[1:]] == [[d, b, a] for d in "12" for b, a in (("1", "4"), ("2", "2"), ("4", "1"))]
    assert all(row[4] == "yes" for row in table[1:])
    kept = call("plan", tiny, "--set", "checkpoint.keep_last=1")
    assert "disk: 3 checkpoints of 0.00 GiB, at most 2 at a time: 0.00 GiB\n" in kept.out
    unknown = call("plan", tiny, "--device", "h10")
    assert unknown.code == 2
    assert 'did you mean "h100"?' in unknown.err


def test_plan_names_the_validation_set(tiny: Path, trained: Trained) -> None:
    fingerprint = json.loads((trained.path / "provenance.json").read_text())["fingerprints"]["val"]
    assert f"  validation data: 8 documents, fingerprint {fingerprint[:12]}" in call("plan", tiny).out
    assert (
        "  validation data: unknown (--set data.path=nowhere: data.path: "
        in call("plan", tiny, "--set", "data.path=nowhere").out
    )


def test_plan_measures_on_request(tiny: Path) -> None:
    assert "--probe" in call("plan", tiny).out
    probed = call("plan", tiny, "--probe").out
    assert re.search(r"time: \d+ s of training at [\d,]+ tokens/s \(measured", probed)


@pytest.mark.parametrize("speed", ["0", "-1", "fast", "nan", "inf"])
def test_plan_wants_a_speed_that_is_one(tiny: Path, speed: str) -> None:
    result = call("plan", tiny, f"--tok-per-sec={speed}")
    assert result.code == 2
    assert "--tok-per-sec" in result.err


# ------------------------------------------------------------------------------------------------------------ plugins


def test_plugins_lists_what_is_installed() -> None:
    result = call("plugins")
    assert result.code == 0
    rows = [line.split() for line in result.out.splitlines()]
    assert rows[0] == ["KIND", "NAME", "DISTRIBUTION", "VERSION", "SUMMARY"]
    assert ["model", "gpt", "nanochat-core", nanochat_core.__version__] in [row[:4] for row in rows]
    assert len({row[0] for row in rows[1:]}) == 6
    assert call("plugins", "--check").code == 0


@pytest.mark.parametrize("kind", ["evaluator", "evaluators"])
def test_plugins_of_one_kind(kind: str) -> None:
    lines = call("plugins", kind).out.splitlines()[1:]
    assert {"bpb", "samples"} <= {line.split()[1] for line in lines}
    assert {line.split()[0] for line in lines} == {"evaluator"}


def test_plugins_explains_each_option() -> None:
    out = call("plugins", "evaluator/samples").out
    assert re.search(r"top_k \(int, unset by default\)\n +sample among", out)
    assert re.search(r"prompts \(list of str, default \[\"The capital", out)
    assert re.search(r"every \(int, default 2000\)\n +number of steps from one evaluation", out)
    assert "sample_every: another name of every" in out
    out = call("plugins", "data_source/parquet").out
    assert re.search(r"path \(.*, required\)\n +\w", out)
    assert "\noptions that every data source has:\n" in out
    assert call("plugins", "data-sources/parquet").out == out


def test_every_option_of_every_plugin_has_a_text() -> None:
    for line in call("plugins").out.splitlines()[1:]:
        kind, name = line.split()[:2]
        out = call("plugins", f"{kind}/{name}").out
        lines = out.splitlines()
        options = [i for i, text in enumerate(lines) if re.match(r"  \w+ \(", text)]
        assert all(lines[i + 1].startswith("      ") for i in options), (kind, name)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("modle", "there is no kind of plugin 'modle' (did you mean \"model\"?)"),
        ("model/gtp", "no model 'gtp' is installed (did you mean \"gpt\"?)"),
        ("logger/zzz", "(installed: "),
    ],
)
def test_plugins_finds_typing_errors(what: str, words: str) -> None:
    result = call("plugins", what)
    assert result.code == 2
    assert words in result.err


def test_check_says_why_a_plugin_failed(broken: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(broken[0])
    listed = call("plugins")
    assert listed.code == 0
    failed = [line for line in listed.err.splitlines() if "failed to load and is left out" in line]
    assert len(failed) == 7
    assert "Traceback" not in listed.err
    assert "unequipped" in listed.out
    assert "[needs surely_missing_module: pip install surely-missing-module]" in listed.out
    checked = call("plugins", "--check")
    assert checked.code == 1
    assert "ModuleNotFoundError: No module named 'surely_missing_module'" in checked.err
    assert "Traceback" in checked.err
    assert "model 'gpt' is claimed by" in checked.err
    result = call("plugins", "model/gpt")
    assert result.code == 2
    assert "is claimed by" in result.err


def test_a_clash_alone_fails_the_check(broken: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(broken[0])
    monkeypatch.setenv("NANOCHAT_PLUGINS", "gpt,broken_name_clash")
    assert call("plugins", "--check").code == 1
    monkeypatch.setenv("NANOCHAT_PLUGINS", "gpt")
    assert call("plugins", "--check").code == 0


COUNTING = """
import os
@hookimpl
def nanochat_register_loggers(registry):
    with open(os.environ["LOADS"], "a") as file:
        file.write("x")
"""


def test_a_command_loads_the_plugins_once(
    site: Site, shards: Path, tiny: Path, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.add("counting-package", COUNTING)
    loads = tmp_path / "loads"
    monkeypatch.setenv("LOADS", str(loads))
    of_runs = ("--runs-dir", trained.runs)
    commands: list[tuple[object, ...]] = [
        ("plugins",),
        ("show", tiny),
        ("plan", tiny, "--vary", "model.depth=1,2,3"),
        ("data", "info", tiny),
        ("data", "info", "--source", "parquet", "--set", f"data.path={shards}"),
        ("tokenizer", "show", tiny, "text"),
        ("tokenizer", "compare", tiny, "tiny", "--val-bytes", "1000", *of_runs),
        ("sample", "tiny", "one, ", "--max-tokens", "1", *of_runs),
    ]
    for command in commands:
        loads.write_text("")
        result = call(*command)
        assert result.code == 0, result.err
        assert loads.read_text() == "x", command


def test_broken_plugins_cost_a_line_and_not_the_run(
    broken: tuple[Path, str], third_party: tuple[Path, str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them at once, beside a model that no one else claims the name of."""
    monkeypatch.syspath_prepend(broken[0])
    monkeypatch.syspath_prepend(third_party[0])
    settings = ("--set", "model={plugin='gru', width=16}", "--set", "train.num_iterations=2")
    result = call("run", tiny, "--runs-dir", tmp_path / "runs", *settings)
    assert result.code == 0, result.err
    assert len(result.err.splitlines()) == 7
    assert all("failed to load and is left out" in line for line in result.err.splitlines())


# --------------------------------------------------------------------------------------------------------------- runs


def test_runs_lists_name_id_status_step_best_validation_data_age_size(trained: Trained) -> None:
    result = call("runs", "--runs-dir", trained.runs)
    assert result.code == 0
    header, row = result.out.splitlines()
    assert header.split() == ["NAME", "ID", "STATUS", "STEP", "BEST", "VAL", "DATA", "AGE", "SIZE"]
    cells = re.split(r"  +", row)
    best = min(r["val/bpb"] for r in map(json.loads, (trained.path / "metrics.jsonl").open()) if "val/bpb" in r)
    assert cells[:5] == ["tiny", trained.path.name, "finished", "12/12", f"val/bpb {best:.4f}"]
    assert cells[5] == json.loads((trained.path / "provenance.json").read_text())["fingerprints"]["val"][:8]
    assert re.fullmatch(r"\d+ (s|min)", cells[6])
    assert re.fullmatch(r"\d+\.\d MB", cells[7])


def test_runs_of_every_fate(trained: Trained, tmp_path: Path) -> None:
    fates = {"a": "finished", "b": "preempted", "c": "failed", "d": "running", "e": None}
    for name, status in fates.items():
        copy = tmp_path / name / trained.path.name
        shutil.copytree(trained.path, copy)
        facts = json.loads((copy / "status.json").read_text())
        (copy / "status.json").write_text("" if status is None else json.dumps({**facts, "status": status}))
    (tmp_path / "e" / trained.path.name / "metrics.jsonl").write_text(
        '{"step": 3, "time": 1.0, "train/loss": 2.0}\n{"ste'
    )
    rows = {
        line.split()[0]: re.split(r"  +", line) for line in call("runs", "--runs-dir", tmp_path).out.splitlines()[1:]
    }
    assert {name: row[2] for name, row in rows.items()} == {
        "a": "finished", "b": "preempted", "c": "failed", "d": "killed", "e": "damaged",
    }  # fmt: skip
    assert rows["e"][4] == "-"


def test_no_runs_yet(tmp_path: Path) -> None:
    result = call("runs", "--runs-dir", tmp_path / "nothing")
    assert result.code == 0
    assert "nanochat run experiments/quickstart.toml" in result.out


# ------------------------------------------------------------------------------------------------------------- sample


def sample(trained: Trained, *arguments: object):  # type: ignore[no-untyped-def]
    return call("sample", "tiny", "one, ", "--runs-dir", trained.runs, *arguments)


def test_sample_continues_the_text(trained: Trained) -> None:
    result = sample(trained, "--max-tokens", 12, "--temperature", 0)
    assert result.code == 0, result.err
    assert result.out.startswith("one, ")
    assert len(result.out) > len("one, \n")
    assert "step_000012" in result.err
    assert sample(trained, "--max-tokens", 12, "--temperature", 0).out == result.out


def test_sampling_depends_on_the_seed_alone(trained: Trained) -> None:
    texts = [sample(trained, "--seed", seed, "--temperature", 2).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_likeliest_of_one_is_greedy(trained: Trained) -> None:
    assert sample(trained, "--top-k", 1).out == sample(trained, "--temperature", 0).out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--temperature", "-1"], "temperature"), (["--max-tokens", "0"], "--max-tokens"), (["--top-k", "0"], "--top-k")],
)
def test_sampling_options_out_of_range(trained: Trained, arguments: list[str], words: str) -> None:
    result = sample(trained, *arguments)
    assert result.code == 2
    assert words in result.err


def test_sample_continues_the_lines_of_a_file(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one, \n\ntwo, \n")
    options = ("--file", tmp_path / "prompts.txt", "--num-samples", 2, "--max-tokens", 9, "--temperature", 1)
    result = sample(trained, *options, "--seed", 7)
    assert result.code == 0, result.err
    texts = result.out.split("\n\n")[:-1]
    alone = [sample(trained, "--max-tokens", 9, "--temperature", 1, "--seed", seed).out[:-1] for seed in (7, 8)]
    assert texts[:2] == texts[2:4] == alone  # "one, " stands in the arguments and in the file
    assert [text[:5] for text in texts[4:]] == ["two, "] * 2


def test_sample_without_a_text(trained: Trained, tmp_path: Path) -> None:
    result = call("sample", "tiny", "--runs-dir", trained.runs)
    assert (result.code, result.err) == (2, 'there is no text to continue: give one, such as "The sun", or --file\n')
    result = sample(trained, "--file", tmp_path)
    assert result.code == 2
    assert result.err.startswith(f"--file {tmp_path} can't be read")


def test_sampling_from_no_run(trained: Trained) -> None:
    result = call("sample", "tinny", "x", "--runs-dir", trained.runs)
    assert result.code == 2
    assert "no run 'tinny' under" in result.err
    assert 'did you mean "tiny"' in result.err


def test_sampling_from_a_run_without_checkpoint(trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained.path, tmp_path / "tiny" / "x", ignore=shutil.ignore_patterns("step_*"))
    result = call("sample", "tiny", "x", "--runs-dir", tmp_path)
    assert result.code == 2
    assert "has no sound checkpoint" in result.err


def test_without_a_cache_what_needs_none_works(tiny, tmp_path, monkeypatch):
    (tmp_path / "a file").touch()
    monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path / "a file"))
    for command in ("show", "plan", "data info"):
        result = call(*command.split(), tiny)
        assert result.code == 0, result.err
    refused = call("run", tiny, "--runs-dir", tmp_path / "runs")
    assert refused.code == 2
    assert "NANOCHAT_HOME: names no usable directory" in refused.err
    assert not (tmp_path / "runs").exists()
