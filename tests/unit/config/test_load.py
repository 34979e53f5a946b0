"""Experiment files: extends, merging, --set, origins, and every problem at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from nanochat_core import ConfigError
from nanochat_core.config.load import LoadedExperiment, load
from nanochat_core.config.merge import parse_override
from nanochat_core.config.tables import dump
from nanochat_core.plugins.discovery import Plugins, load_plugins

PLUGINS = load_plugins()

BASE = """\
[tokenizer]
plugin = "bytes"

[data]
plugin = "python_docs"

[model]
plugin = "gpt"
depth = 4
softcap = 20.0

[optimizer]
plugin = "muon_adamw"
matrix_lr = 0.05

[train]
num_iterations = 100

[[evaluators]]
plugin = "bpb"
every = 10

[[evaluators]]
name = "bpb_train"
plugin = "bpb"
split = "train"

[[loggers]]
plugin = "console"
"""


class Files:
    """Experiment files in a directory, loaded from there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.write("base.toml", BASE)

    def write(self, name: str, text: str) -> Path:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def load(self, name: str, *overrides: str) -> LoadedExperiment:
        return load(self.directory / name, overrides, PLUGINS).require_all()

    def child(self, text: str, *overrides: str) -> LoadedExperiment:
        self.write("child.toml", 'extends = "base.toml"\n' + text)
        return self.load("child.toml", *overrides)

    def problems(self, text: str, *overrides: str) -> list[str]:
        """What is wrong with a child of the base, without the directory."""
        with pytest.raises(ConfigError) as caught:
            self.child(text, *overrides)
        return [str(p).replace(f"{self.directory}/", "") for p in caught.value.problems]

    def problem(self, text: str, *overrides: str) -> str:
        (line,) = self.problems(text, *overrides)
        return line


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def names(loaded: LoadedExperiment) -> list[str]:
    return [choice.name for choice in loaded.experiment.evaluators]


# ------------------------------------------------------------------------------------------------------- extends


def test_tables_merge_by_key(files: Files) -> None:
    model = files.child("[model]\ndepth = 8").experiment.model.config
    assert (model.depth, model.softcap) == (8, 20.0)


def test_a_chain_through_directories(files: Files) -> None:
    files.write("arms/middle.toml", 'extends = "../base.toml"\n[model]\ndepth = 6\nrope_base = 5.0\n')
    files.write("arms/leaf/leaf.toml", 'extends = "../middle.toml"\n[model]\ndepth = 7\n')
    loaded = files.load("arms/leaf/leaf.toml")
    model = loaded.experiment.model.config
    assert (model.depth, model.rope_base, model.softcap) == (7, 5.0, 20.0)
    assert loaded.experiment.run.name == "leaf"


def test_a_circle_is_refused_and_shown(files: Files) -> None:
    files.write("a.toml", 'extends = "b.toml"\n')
    files.write("b.toml", '# b\nextends = "a.toml"\n')
    with pytest.raises(ConfigError, match=r"b\.toml:2: extends: .*circle: .*a\.toml -> .*b\.toml -> .*a\.toml"):
        files.load("a.toml")


def test_a_missing_base_names_the_line_and_a_near_name(files: Files) -> None:
    files.write("x.toml", '\nextends = "bass.toml"\n')
    with pytest.raises(ConfigError, match=r'x\.toml:2: extends: no file .*bass\.toml \(did you mean "base\.toml"\?\)'):
        files.load("x.toml")


def test_a_missing_file(files: Files) -> None:
    with pytest.raises(ConfigError, match=r"^no file .*bsae\.toml .*base\.toml"):
        files.load("bsae.toml")
    with pytest.raises(ConfigError, match=r"can't be read"):
        files.load("")  # the directory itself


def test_extends_takes_one_name(files: Files) -> None:
    files.write("x.toml", 'extends = ["base.toml"]\n')
    with pytest.raises(ConfigError, match=r"x\.toml:1: extends: must be the name of one file"):
        files.load("x.toml")


def test_no_toml_names_the_line_in_the_file_that_has_it(files: Files) -> None:
    files.write("base.toml", BASE + "\ndepth 3\n")
    with pytest.raises(ConfigError, match=rf"base\.toml:{len(BASE.splitlines()) + 2}: not valid TOML"):
        files.child("")
    files.write("base.toml", BASE).write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"base\.toml: can't be read"):
        files.child("")


def test_another_plugin_drops_the_options_of_the_old_one(files: Files) -> None:
    optimizer = files.child('[optimizer]\nplugin = "adamw"').experiment.optimizer
    assert optimizer.plugin == "adamw"
    assert optimizer.config.lr == 2e-3


def test_naming_the_same_plugin_again_drops_nothing(files: Files) -> None:
    assert files.child('[model]\nplugin = "gpt"').experiment.model.config.depth == 4


def test_another_plugin_by_set_drops_them_too(files: Files) -> None:
    optimizer = files.load("base.toml", "optimizer.plugin=adamw", "optimizer.lr=0.5").experiment.optimizer
    assert (optimizer.plugin, optimizer.config.lr) == ("adamw", 0.5)


def test_lists_of_values_are_replaced(files: Files) -> None:
    files.write("base.toml", BASE + '[run]\ntags = ["a", "b"]\n')
    assert files.child('[run]\ntags = ["c"]').experiment.run.tags == ("c",)
    assert files.child("", "run.tags=[]").experiment.run.tags == ()


def test_a_byte_order_mark_does_no_harm(files: Files) -> None:
    files.write("bom.toml", "\ufeff" + BASE)
    loaded = files.load("bom.toml")
    assert loaded.origins["tokenizer.plugin"].text.endswith("bom.toml:2")


# --------------------------------------------------------------------------------------------------- list entries


def test_entries_merge_by_name_and_keep_their_order(files: Files) -> None:
    loaded = files.child('[[evaluators]]\nplugin = "bpb"\neval_tokens = 5\n[[evaluators]]\nplugin = "samples"')
    assert names(loaded) == ["bpb", "bpb_train", "samples"]
    first, second, third = loaded.experiment.evaluators
    assert (first.keys.every, first.config.eval_tokens) == (10, 5)  # type: ignore[attr-defined]
    assert second.config.split == "train"
    assert third.config.max_new_tokens == 16


def test_an_entry_is_addressed_by_its_name_alone(files: Files) -> None:
    loaded = files.child('[[evaluators]]\nname = "bpb_train"\nevery = 3')
    assert loaded.experiment.evaluators[1].keys.every == 3  # type: ignore[attr-defined]
    assert loaded.experiment.evaluators[1].config.split == "train"


def test_another_plugin_in_an_entry_drops_its_options(files: Files) -> None:
    loaded = files.child('[[evaluators]]\nname = "bpb"\nplugin = "samples"')
    assert loaded.experiment.evaluators[0].name == "bpb"
    assert loaded.experiment.evaluators[0].keys.every == 2000  # type: ignore[attr-defined]


def test_two_entries_of_one_plugin_need_names(files: Files) -> None:
    line = files.problem('[[loggers]]\nplugin = "tensorboard"\n\n[[loggers]]\nplugin = "tensorboard"\n')
    assert line.startswith("child.toml:5: loggers.tensorboard: two entries have this name")


def test_remove_drops_an_inherited_entry(files: Files) -> None:
    assert names(files.child('[[evaluators]]\nname = "bpb"\nremove = true')) == ["bpb_train"]
    assert names(files.load("base.toml", "evaluators.bpb_train.remove=true")) == ["bpb"]
    files.child('[[evaluators]]\nname = "bpb"\nremove = true')
    files.write("grandchild.toml", 'extends = "child.toml"\n[[evaluators]]\nplugin = "bpb"\nevery = 7')
    back = files.load("grandchild.toml")
    assert names(back) == ["bpb_train", "bpb"]


def test_remove_finds_typing_errors(files: Files) -> None:
    line = files.problem('[[evaluators]]\nname = "bpb_tran"\nremove = true')
    assert line == 'child.toml:2: evaluators.bpb_tran: nothing to remove (did you mean "bpb_train"?)'
    line = files.problem('[[evaluators]]\nname = "bpb"\nremove = false')
    assert line.startswith("child.toml:2: evaluators.bpb.remove: must be true")


def test_an_entry_needs_a_plugin_and_names_what_there_is(files: Files) -> None:
    assert files.problem("[[loggers]]\nlog_every = 2").startswith('child.toml:2: loggers[0]: needs a plugin = "..."')
    line = files.problem('[[loggers]]\nname = "mine"')
    assert line.startswith("child.toml:3: loggers.mine.plugin: missing")
    assert "(installed: " in line
    assert "console" in line
    assert "write each entry as [[evaluators]]" in files.problem('evaluators = ["bpb"]')


def test_names_of_entries_are_parts_of_keys(files: Files) -> None:
    line = files.problem('[[loggers]]\nname = "a.b"\nplugin = "console"')
    assert line.startswith("child.toml:3: loggers.a.b.name: must be a name without dots")


def test_entries_may_stand_in_tables_of_their_names(files: Files) -> None:
    assert names(files.child('[evaluators.more]\nplugin = "bpb"')) == ["bpb", "bpb_train", "more"]
    line = files.problem('[evaluators.more]\nplugin = "bpb"\nname = "other"')
    assert line.startswith('child.toml:4: evaluators.more.name: an entry keeps its name, "more"')


# ----------------------------------------------------------------------------------------------------------- --set


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a.b=3", 3),
        ("a.b = 3", 3),
        ("a.b=3.0", 3.0),
        ("a.b=true", True),
        ("a.b=[1, 2]", [1, 2]),
        ("a.b={x = 1}", {"x": 1}),
        ('a.b="quoted = text"', "quoted = text"),
        ("a.b=bare", "bare"),
        ("a.b=two words", "two words"),
        ("a.b=data/shards", "data/shards"),
        ("a.b=x=y", "x=y"),
        ("a.b=2026-01-31", "2026-01-31"),
        ("a.b=", ""),
    ],
)
def test_values_are_toml_and_bare_words_are_strings(text: str, value: Any) -> None:
    path, parsed = parse_override(text)
    assert path == ("a", "b")
    assert parsed == value
    assert type(parsed) is type(value)


def test_set_wins_and_the_last_one_most(files: Files) -> None:
    loaded = files.child("[model]\ndepth = 8", "model.depth=12", "model.depth=16", "run.tags=['a', 'b']")
    assert loaded.experiment.model.config.depth == 16
    assert loaded.experiment.run.tags == ("a", "b")


def test_set_addresses_entries_by_name(files: Files) -> None:
    loaded = files.load("base.toml", "evaluators.bpb_train.every=50", "loggers.console.log_every=2")
    assert loaded.experiment.evaluators[1].keys.every == 50  # type: ignore[attr-defined]
    assert loaded.experiment.loggers[0].config.log_every == 2


def test_set_adds_an_entry(files: Files) -> None:
    loaded = files.load("base.toml", "evaluators.two.every = 3", "evaluators.two.plugin = bpb")
    assert names(loaded) == ["bpb", "bpb_train", "two"]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.dept=3", '--set model.dept=3: model.dept: unknown key of model plugin "gpt" (did you mean "depth"?)'),
        ("modl.depth=3", '--set modl.depth=3: modl: unknown table (did you mean "model"?)'),
        ("evaluators.bb.every=3", '--set evaluators.bb.every=3: evaluators.bb: no entry of this name (did you mean'),
        ("evaluators.bpb=3", "--set evaluators.bpb=3: evaluators.bpb: must be a table"),
        ("evaluators=3", "--set evaluators=3: evaluators: must be a list of tables"),
        ("evaluators.bpb.name=x", "--set evaluators.bpb.name=x: evaluators.bpb.name: an entry keeps its name"),
        ("train.grad_clip=yes", '--set train.grad_clip=yes: train.grad_clip: must be float, not "yes"'),
        ("model.depth", "--set: write key=value, as in model.depth=12, not 'model.depth'"),
        ("=3", "--set: write key=value"),
        ("model..depth=3", "--set: write key=value"),
        ("run.name=../up", "--set run.name=../up: run.name: must not begin with a dot or a dash"),
        ("model.plugin={a = 1}", "--set model.plugin={a = 1}: model.plugin: missing: name a model plugin"),
    ],
)  # fmt: skip
def test_typing_errors_in_set(files: Files, override: str, line: str) -> None:
    assert files.problem("", override).startswith(line)


def test_settings_that_contradict_each_other(files: Files) -> None:
    lines = files.problems("", "model.depth=3", "model.depth.x=4", "evaluators=1", "evaluators.bpb.every=2")
    assert any(line.startswith("--set: model.depth.x: an earlier --set made this a value") for line in lines)


# ---------------------------------------------------------------------------------------- options that exclude others


def horizons(loaded: LoadedExperiment) -> tuple[Any, ...]:
    train = loaded.experiment.train
    return train.num_iterations, train.target_flops, train.target_param_data_ratio


def test_a_later_horizon_replaces_the_inherited_one(files: Files) -> None:
    assert horizons(files.load("base.toml")) == (100, None, None)
    assert horizons(files.child("[train]\ntarget_flops = 1e15")) == (None, 1e15, None)
    assert horizons(files.child("[train]\ntarget_flops = 1e15", "train.target_param_data_ratio=12")) == (None, None, 12)
    assert horizons(files.child("[train]\nnum_iterations = 7")) == (7, None, None)


def test_two_horizons_in_one_file_name_both_places(files: Files) -> None:
    line = files.problem("[train]\nnum_iterations = 5\ntarget_flops = 1e9")
    assert line.startswith("child.toml:4: train.target_flops: give one of num_iterations, target_flops")
    assert "num_iterations (" in line
    assert "child.toml:3)" in line


def test_without_a_horizon_it_is_twenty_tokens_a_parameter(files: Files) -> None:
    loaded = files.child("", "train={}")
    assert horizons(loaded) == (100, None, None)
    files.write("base.toml", BASE.replace("[train]\nnum_iterations = 100\n", ""))
    loaded = files.load("base.toml")
    assert horizons(loaded) == (None, None, 20.0)
    assert loaded.origins["train.target_param_data_ratio"].text == "default"


def test_a_later_warmup_replaces_the_inherited_one(files: Files) -> None:
    files.write("base.toml", BASE + "[schedule]\nwarmup_ratio = 0.1\n")
    schedule = files.child("[schedule]\nwarmup_steps = 9").experiment.schedule
    assert (schedule.warmup_ratio, schedule.warmup_steps) == (None, 9)
    line = files.problem("[schedule]\nwarmup_steps = 9\nwarmup_ratio = 0.2")
    assert line.startswith("child.toml:3: schedule.warmup_steps: give one of warmup_ratio, warmup_steps")


# ----------------------------------------------------------------------------------------------------------- aliases


def every(loaded: LoadedExperiment) -> int:
    return loaded.experiment.evaluators[0].keys.every  # type: ignore[attr-defined, no-any-return]


def test_an_old_name_is_an_option_by_another_name(files: Files) -> None:
    loaded = files.child('[[evaluators]]\nname = "bpb"\neval_every = 77')
    assert every(loaded) == 77
    assert loaded.origins["evaluators.bpb.every"].text.endswith("child.toml:4")
    assert every(files.load("base.toml", "evaluators.bpb.eval_every=5")) == 5


def test_of_old_and_new_name_the_later_layer_counts(files: Files) -> None:
    files.write("base.toml", BASE.replace("every = 10", "eval_every = 10"))
    assert every(files.load("base.toml")) == 10
    assert every(files.child('[[evaluators]]\nname = "bpb"\nevery = 77')) == 77
    assert every(files.child('[[evaluators]]\nname = "bpb"\nevery = 77', "evaluators.bpb.eval_every=5")) == 5


def test_old_and_new_name_in_one_file_are_one_too_many(files: Files) -> None:
    line = files.problem('[[evaluators]]\nname = "bpb"\nevery = 1\neval_every = 2')
    assert line == "child.toml:5: evaluators.bpb.eval_every: is another name of every, and both are given: drop one"


# ----------------------------------------------------------------------------------------------------------- origins


def test_every_value_has_an_origin(files: Files) -> None:
    loaded = files.child(
        "[run]\nproject = 'p'\n[model]\nrope_base = 5\ndepth = 5", "train.grad_clip=0.5", "model.softcap=2"
    )
    origins = {key: origin.text.replace(f"{files.directory}/", "") for key, origin in loaded.origins.items()}
    expected = {
        "run.name": "default: the file's name",
        "run.project": "child.toml:3",
        "run.group": "default",
        "model.plugin": "base.toml:8",
        "model.depth": "child.toml:6",
        "model.rope_base": "child.toml:5",
        "model.softcap": "--set model.softcap=2",
        "model.norm_eps": "default",
        "train.grad_clip": "--set train.grad_clip=0.5",
        "train.num_iterations": "base.toml:17",
        "evaluators.bpb.every": "base.toml:21",
        "evaluators.bpb_train.every": "default",
        "evaluators.bpb_train.split": "base.toml:26",
        "evaluators.bpb_train.name": "base.toml:24",
        "loggers.console.plugin": "base.toml:29",
    }
    assert {key: origins[key] for key in expected} == expected
    assert not [key for key, text in origins.items() if not text]


def test_the_line_of_inline_tables_and_dotted_keys(files: Files) -> None:
    loaded = files.child('model.depth = 3\ntrain = {grad_clip = 2.0}\n"run"."group" = "g"')
    assert loaded.origins["model.depth"].text.endswith("child.toml:2")
    assert loaded.origins["train.grad_clip"].text.endswith("child.toml:3")
    assert loaded.origins["run.group"].text.endswith("child.toml:4")


# ------------------------------------------------------------------------------------------- problems, all at once


def test_all_problems_with_file_line_key_and_remedy(files: Files) -> None:
    files.write("base.toml", BASE.replace("softcap = 20.0", 'softcap = "off"'))
    lines = files.problems(
        """
[model]
detph = 3
depth = "12"

[train]
max_seq_len = 0
num_iterations = 12.7
compile = "yes"

[oops]
x = 1

[[evaluators]]
name = "bpb"
evry = 5

[schedule]
warmup_ratio = 2
""",
        "run.tags=[1]",
    )
    assert sorted(lines) == sorted(
        [
            'base.toml:10: model.softcap: must be float, not "off"',
            'child.toml:4: model.detph: unknown key of model plugin "gpt" (did you mean "depth"?)',
            'child.toml:5: model.depth: must be int, not "12"',
            "child.toml:8: train.max_seq_len: must be at least 1, not 0",
            "child.toml:9: train.num_iterations: must be int, not 12.7",
            'child.toml:10: train.compile: must be bool or "auto", not "yes"',
            "child.toml:13: oops: unknown table",
            'child.toml:17: evaluators.bpb.evry: unknown key of evaluator plugin "bpb" (did you mean "every"?)',
            "child.toml:20: schedule.warmup_ratio: must lie between 0 and 1, not 2.0",
            "--set run.tags=[1]: run.tags: must be str, not 1",
        ]
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[modle]\nplugin = "gpt"', 'child.toml:3: modle: unknown table (did you mean "model"?)'),
        ("depth = 3", "child.toml:2: depth: unknown table"),
        ("model = 3", "child.toml:2: model: must be a table"),
        ("[[train]]\ngrad_clip = 1", "child.toml:2: train: must be a table"),
        ('[checkpoint]\nsave_evry = 3', 'child.toml:3: checkpoint.save_evry: unknown key (did you mean "save_every"?)'),
        ("[train]\nseed = -1", "child.toml:3: train.seed: must lie between 0 and"),
        ("[train]\ngrad_clip = nan", "child.toml:3: train.grad_clip: must be at least 0, not nan"),
        ("[model]\ndepth = 1979-05-27", "child.toml:3: model.depth: must be int, not 1979-05-27"),
        ("[run]\ntags = 'x'", "child.toml:3: run.tags: must be a list of str"),
        ('[data]\nplugin = "parquet"', "child.toml:3: data.path: missing: give a value ("),
    ],
)  # fmt: skip
def test_single_problems(files: Files, text: str, line: str) -> None:
    lines = files.problems(text)
    assert any(found.startswith(line) for found in lines), lines


def test_the_files_name_must_do_as_a_name(files: Files) -> None:
    files.write("a:b.toml", BASE)
    with pytest.raises(ConfigError, match=r"run\.name: the file's name must not contain slashes.*give one"):
        files.load("a:b.toml")
    assert files.load("a:b.toml", "run.name=ab").experiment.run.name == "ab"


# ---------------------------------------------------------------------------------------------------------- missing


def test_what_is_not_installed_is_told_and_does_not_stop_a_look(files: Files) -> None:
    files.write("x.toml", BASE + '[[evaluators]]\nplugin = "arena"\nname = "mine"\nevery = 9\nmax_per_task = 5\n')
    loaded = load(files.directory / "x.toml", ["data.plugin=far_away"], PLUGINS)
    assert len(loaded.missing) == 2
    data, evaluator = map(str, loaded.missing)
    assert data.startswith('--set data.plugin=far_away: data.plugin: no data source plugin "far_away" is installed')
    assert "x.toml:31: evaluators.mine.plugin: no evaluator plugin" in evaluator
    mine = loaded.experiment.evaluators[-1]
    assert (mine.name, mine.keys.every, mine.config) == ("mine", 9, {"max_per_task": 5})  # type: ignore[attr-defined]
    assert loaded.origins["evaluators.mine.every"].text.endswith("x.toml:33")
    with pytest.raises(ConfigError) as caught:
        loaded.require_all()
    assert len(caught.value.problems) == 2


def test_missing_plugins_stand_beside_the_other_problems(files: Files) -> None:
    lines = files.problems('[model]\nplugin = "gtp"\n[train]\nseed = "x"')
    assert len(lines) == 2
    assert any('no model plugin "gtp" is installed (did you mean "gpt"?)' in line for line in lines)


def test_nothing_is_installed(files: Files) -> None:
    with pytest.raises(ConfigError, match="no model plugin"):
        load(files.directory / "base.toml", (), Plugins()).require_all()


# -------------------------------------------------------------------------------------------------------- and back


def test_a_dump_loads_again_to_the_same_experiment(files: Files) -> None:
    loaded = files.child(
        """
[run]
tags = ["a", "b"]
[data]
plugin = "parquet"
path = "some/where"
[schedule]
warmup_steps = 0
[[evaluators]]
name = "s"
plugin = "samples"
prompts = ["quotes \\" and ünïcode \\n"]
at_start = true
[[loggers]]
plugin = "console"
remove = true
""".replace('plugin = "console"', 'name = "console"'),
        "train.total_batch_size=auto",
    )
    again = load(files.write("again.toml", dump(loaded.experiment)), (), PLUGINS)
    assert again.experiment == loaded.experiment
    assert again.experiment.loggers == ()
    assert again.experiment.run.name == "child"


# ------------------------------------------------------------------------------------------- files that are none


def test_only_regular_files_are_read(files: Files) -> None:
    os.mkfifo(files.directory / "pipe")
    for place in ("pipe", "/dev/zero"):
        with pytest.raises(ConfigError, match=r"can't be read: it is not a regular file"):
            files.load(place)
        files.write("x.toml", f'extends = "{place}"')
        with pytest.raises(ConfigError, match=r"can't be read: it is not a regular file"):
            files.load("x.toml")


def test_a_huge_file_is_refused(files: Files) -> None:
    files.write("x.toml", "#" * (2 << 20))
    with pytest.raises(ConfigError, match=r"can't be read: it has more than the 1,048,576 bytes"):
        files.load("x.toml")


@pytest.mark.parametrize(
    ("name", "message"),
    [("a\\u0000b", "no NUL"), ("x" * 5000, "at most"), ("a/" * 3000, "at most"), ("", "can't be read")],
)
def test_a_base_that_can_be_no_file(files: Files, name: str, message: str) -> None:
    files.write("x.toml", f'\nextends = "{name}"\n')
    with pytest.raises(ConfigError, match=message) as caught:
        files.load("x.toml")
    assert len(str(caught.value)) < 700


def test_a_long_chain_is_refused(files: Files) -> None:
    for number in range(40):
        files.write(f"{number}.toml", f'extends = "{number + 1}.toml"')
    with pytest.raises(ConfigError, match="extend each other more than 32 times"):
        files.load("0.toml")


@pytest.mark.parametrize("text", ["2024", "1e5", "nan", "true", "0x10", "inf"])
def test_text_in_set_needs_no_quotes(files: Files, text: str) -> None:
    loaded = files.child("", f"run.name={text}", f"data.plugin={'jsonl'}", f"data.path={text}", f"run.group={text}")
    assert (loaded.experiment.run.name, loaded.experiment.run.group) == (text, text)
    assert Path(loaded.experiment.data.config.path).name == text


def test_a_number_is_no_text_elsewhere(files: Files) -> None:
    assert files.problem("[run]\nname = 2024") == "child.toml:3: run.name: must be str, not 2024"
    assert files.problem("", "run.tags=2024").endswith("run.tags: must be a list of str, not 2024")


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "--help", ".", "x" * 300, "a/b", " ", "\x7f"])
def test_names_that_are_none(files: Files, name: str) -> None:
    for override in (f'run.name="{name}"', f"evaluators.bpb.plugin={name}"):
        if name.strip():
            with pytest.raises(ConfigError) as caught:
                files.child("", override.encode("unicode_escape").decode())
            assert str(caught.value).isprintable()
            assert len(str(caught.value)) < 800


def test_long_and_hostile_texts_are_shown_in_short(files: Files) -> None:
    key = "k" * 5000
    for override in (f"{key}=1", f"run.{key}=1", f"model.depth={key}", f"train.dtype={key}", "model.\x1b=\x07"):
        with pytest.raises(ConfigError) as caught:
            files.child("", override)
        (line,) = str(caught.value).splitlines()
        assert line.isprintable()
        assert len(line) < 1000


def test_of_very_many_problems_some_are_told(files: Files) -> None:
    problems = files.problems("".join(f"k{n} = 1\n" for n in range(1000)))
    assert len(problems) == 101
    assert problems[-1] == "and 900 more"


def test_a_key_of_a_home_that_is_unknown(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("~nobody_here/x", "a\\u0000b", "x" * 300):
        line = files.problem(f'[data]\nplugin = "jsonl"\npath = "{path}"')
        assert line.startswith("child.toml:4: data.path: must be ")
        line = files.problem(f'[[loggers]]\nplugin = "csv"\ndirectory = "{path}"')
        assert line.startswith("child.toml:4: loggers.csv.directory: must be ")


def test_a_text_that_is_not_unicode_is_named_as_such(files: Files) -> None:
    """Also where a list of texts would do: that it is no list is not what is wrong."""
    line = files.problem("", "data.plugin=jsonl", "data.path=caf\udce9")
    assert "data.path: must be valid Unicode" in line
