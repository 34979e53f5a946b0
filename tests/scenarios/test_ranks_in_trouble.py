"""One of two ranks dies, raises or stalls: what the other does, what people are told, and how the run goes on."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed
from helpers.install import install_fixture
from helpers.processes import Process
from helpers.support import HEADER, assert_same_end, call, ledger, only_run

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")

PLUGIN = '''
import os, time
from pathlib import Path
import torch
from nanochat_core import DataError, DataSource, Evaluation, Evaluator
from nanochat_core.testing.optimizer import TinyModel

def trouble(file, where):
    """What the file asks for: whose rank, where, and what."""
    file = Path(file)
    while file.exists() and file.read_text().split()[:2] == [os.environ.get("RANK", "0"), where]:
        what = file.read_text().split()[2]
        if what == "raise": raise RuntimeError("no good")
        if what == "mistake": raise DataError("no such shard")
        time.sleep(0.01)

@attrs.frozen
class File:
    file: str

class Noisy(TinyModel):
    """Draws random numbers in training, so that their state matters."""
    def __init__(self, config, context):
        super().__init__(context.vocab_size)
        self.file, self.max_positions = config.file, None
    def hidden(self, ids_BT, cache=None):
        if self.training and not ids_BT.is_meta: trouble(self.file, "model")
        hidden_BTD = super().hidden(ids_BT, cache)
        return hidden_BTD + 0.01 * torch.randn_like(hidden_BTD) if self.training else hidden_BTD

class Source(DataSource):
    def __init__(self, config, context): self.file = config.file
    def documents(self, split):
        return Documents(self.file) if split == "train" else ["some words to be evaluated"] * 20

class Documents(list):
    def __init__(self, file):
        super().__init__(f"document {i}, which has {i * i} words" for i in range(50))
        self.file = file
    def __getitem__(self, index):
        trouble(self.file, "data")
        return super().__getitem__(index)

class Nothing(Evaluator):
    def __init__(self, config, context): trouble(config.file, "building")
    def evaluate(self, model, step): return Evaluation()

@hookimpl
def nanochat_register_models(registry):
    registry.add("noisy", config=File, factory="made_up.plugin:Noisy")

@hookimpl
def nanochat_register_data_sources(registry):
    registry.add("source", config=File, factory="made_up.plugin:Source")

@hookimpl
def nanochat_register_evaluators(registry):
    registry.add("nothing", config=File, factory="made_up.plugin:Nothing")
'''

EXPERIMENT = """
[tokenizer]
plugin = "bytes"

[data]
plugin = "source"
file = "{file}"

[model]
plugin = "noisy"
file = "{file}"

[optimizer]
plugin = "muon_adamw"

[train]
max_seq_len = 32
device_batch_size = 4
total_batch_size = 256
num_iterations = 40
dtype = "float32"
compile = false
stall_warning = 1.0

[checkpoint]
save_every = 20

[[evaluators]]
plugin = "bpb"
every = 20
eval_tokens = 256

[[evaluators]]
plugin = "nothing"
file = "{file}"
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the plugin above."""
    directory = tmp_path_factory.mktemp("ranks")
    package = directory / "source" / "made_up"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "plugin.py").write_text(HEADER + PLUGIN, encoding="utf-8")
    (directory / "source/pyproject.toml").write_text(
        '[project]\nname = "made-up"\nversion = "1.0"\n[project.entry-points.nanochat]\nmade_up = "made_up.plugin"\n'
    )
    (directory / "site").mkdir()
    install_fixture(directory / "source", directory / "site")
    return directory / "site"


class Job:
    """Runs of one experiment on two ranks, which get into trouble once the file asks for it."""

    def __init__(self, directory: Path, site: Path) -> None:
        self.file, self.runs, self.site = directory / "trouble", directory / "runs", site
        self.experiment = directory / "experiment.toml"
        self.experiment.write_text(EXPERIMENT.format(file=self.file.as_posix()))

    def start(self, *more: object, env: dict[str, str] | None = None) -> Process:
        return Process.run(self.experiment, "--runs-dir", self.runs, "--nproc", 2, *more, site=self.site, env=env)

    @property
    def path(self) -> Path:
        return only_run(self.runs)

    def has_trained(self, steps: int = 3) -> Callable[[], bool]:
        return lambda: bool(list(self.runs.glob("*/*/metrics.jsonl"))) and len(ledger(self.path)) >= steps

    def says(self, *texts: str, log: str = "log.txt") -> Callable[[], bool]:
        return lambda: all(text in (self.path / log).read_text() for text in texts)


@pytest.fixture
def job(tmp_path: Path, site: Path) -> Job:
    return Job(tmp_path, site)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, site: Path) -> Path:
    """A run on two ranks that nothing happened to."""
    job = Job(tmp_path_factory.mktemp("whole"), site)
    with job.start() as process:
        code, _, err = process.end()
    assert code == 0, err
    return job.path


# ------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("rank", "where", "what", "expected", "first"),
    [
        (1, "model", "raise", 2, "rank 1: plugin 'made_up' of made-up 1.0 failed: RuntimeError: no good"),
        (0, "model", "raise", 2, "plugin 'made_up' of made-up 1.0 failed: RuntimeError: no good"),
        (1, "data", "mistake", 2, "rank 1: no such shard"),
        (1, "building", "raise", 2, "rank 1: evaluator 'nothing'"),
    ],
)
def test_what_a_rank_raises_is_shown_once_and_ends_the_others(
    job: Job, rank: int, where: str, what: str, expected: int, first: str
) -> None:
    job.file.write_text(f"{rank} {where} {what}")
    with job.start() as process:
        code, _, err = process.end()
    assert code == expected, err
    assert err.startswith(first)
    assert "Traceback" not in err
    if where == "model":
        assert err.count("RuntimeError: no good") == 1
        log = "log.txt" if rank == 0 else f"logs/rank_{rank:03d}.txt"
        assert job.says("RuntimeError: no good", log=log)()
        assert json.loads((job.path / "status.json").read_text())["status"] == "failed"


def test_a_signal_before_training_stops_all_ranks(job: Job) -> None:
    job.file.write_text("1 building stall")
    with job.start() as process:
        process.wait_for(lambda: bool(list(job.runs.glob("*/*/provenance.json"))))  # rank 1 builds, rank 0 waits for it
        process.process.send_signal(signal.SIGTERM)
        code, _, err = process.end()
    assert code == 75, err
    assert "Traceback" not in err
    assert "stopped by a signal before training began" in err
    assert not job.runs.exists()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the workers in /proc")
def test_a_rank_that_is_killed_takes_the_others_down(job: Job) -> None:
    with job.start("--set", "train.num_iterations=100000", "--set", "schedule.warmdown_ratio=0") as process:
        process.wait_for(job.has_trained())
        workers = process.workers()
        os.kill(workers[1], signal.SIGKILL)
        code, _, err = process.end()
    assert code == 137
    (line,) = err.splitlines()
    assert line.startswith("rank 1 was killed by SIGKILL, most likely because the machine was out of memory")
    assert "logs/rank_001.txt" in line
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert "ed" in call("runs", "--runs-dir", job.runs).out  # failed, or killed


# --------------------------------------------------------------------------------------------------- stalls


def test_a_stalled_source_is_named_and_a_signal_cuts_the_wait_short(job: Job, whole: Path) -> None:
    with job.start() as process:
        process.wait_for(job.has_trained())
        job.file.write_text("1 data stall")
        process.wait_for(job.says("s: rank 1: waits for training data: ", "in trouble; rank 0: waits for the other"))
        process.wait_for(job.says("in trouble", log="logs/rank_001.txt"))  # the stacks
        process.process.send_signal(signal.SIGTERM)
        code, out, err = process.end()  # although the source never answers
    assert code == 75, err
    assert "plugin.py:" in out
    assert "stopped by a signal after step" in out
    assert "Traceback" not in err
    assert json.loads((job.path / "status.json").read_text())["status"] == "preempted"
    job.file.unlink()
    with job.start("--resume") as process:
        code, _, err = process.end()
    assert code == 0, err
    assert_same_end(job.path, whole)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the workers in /proc")
def test_a_collective_that_waits_for_a_sleeping_rank(job: Job, whole: Path) -> None:
    with job.start() as process:
        process.wait_for(job.has_trained(21))
        job.file.write_text("1 model stall")
        process.wait_for(job.says("s: rank 1: is at ", "in trouble; rank 0: waits for the other ranks in "))
        job.file.write_text("0 model stall")
        process.wait_for(job.says("continues after"))
        process.wait_for(job.says("s: rank 0: is at ", "in trouble; rank 1: waits for the other ranks in "))
        for worker in process.workers():
            os.kill(worker, signal.SIGKILL)
        assert process.end()[0] == 137
    job.file.unlink()
    with job.start("--resume", "auto") as process:
        code, _, err = process.end()
    assert code == 0, err
    assert_same_end(job.path, whole)
