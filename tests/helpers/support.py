"""Helpers for tests of commands and runs."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from helpers.install import install_fixture
from nanochat_core.cli import main
from nanochat_core.distributed.signals import REQUESTS

ROOT = Path(__file__).parents[2]
THIRD_PARTY = ROOT / "tests" / "fixtures" / "thirdparty"
BROKEN = ROOT / "tests" / "fixtures" / "broken"

# An experiment of twelve quick steps with plugins that nanochat ships.
TINY = """
[run]
name = "tiny"

[tokenizer]
plugin = "bytes"

[data]
plugin = "parquet"
path = "{shards}"

[model]
plugin = "gpt"
depth = 1
aspect_ratio = 32
head_dim = 16

[optimizer]
plugin = "muon_adamw"

[train]
max_seq_len = 32
device_batch_size = 4
total_batch_size = 256
num_iterations = 12
dtype = "float32"
compile = false

[checkpoint]
save_every = 4

[[evaluators]]
plugin = "bpb"
every = 4
eval_tokens = 512

[[evaluators]]
plugin = "samples"
prompts = ["one, ", "two, "]
max_new_tokens = 4

[[loggers]]
plugin = "console"
"""


@attrs.frozen
class Result:
    """Result of a command: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


@attrs.frozen
class Trained:
    """A finished run: its experiment file, the runs directory, its own directory, and the result of the command."""

    file: Path
    runs: Path
    path: Path
    result: Result


def call(*arguments: object) -> Result:
    """Run ``nanochat ARGUMENTS`` in this process. Exceptions that are not user errors are raised."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {
        number: signal.getsignal(number) for number in REQUESTS
    }  # a run keeps its own to the end of the process
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as ended:  # argparse
            code = ended.code if isinstance(ended.code, int) else 1
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return Result(code, out.getvalue(), err.getvalue())


def spawn(
    *arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: float = 300
) -> Result:
    """Run ``nanochat ARGUMENTS`` in a separate process."""
    done = subprocess.run(
        [sys.executable, "-m", "nanochat_core", *map(str, arguments)],
        cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    return Result(done.returncode, done.stdout, done.stderr)


def write_shards(directory: Path, train: int = 64, val: int = 8) -> Path:
    """Write two parquet shards whose documents are sequences of number words. Returns ``directory``."""
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    documents = [", ".join(words[(i * 7 + k) % 10] for k in range(20 + i % 5)) + ".\n" for i in range(train + val)]
    for index, texts in enumerate((documents[:train], documents[train:])):
        pq.write_table(pa.table({"text": texts}), directory / f"shard_{index:05d}.parquet")
    return directory


def write_experiment(file: Path, shards: Path, more: str = "") -> Path:
    """Write the experiment ``TINY`` on ``shards``, followed by more tables. Returns ``file``."""
    file.write_text(TINY.format(shards=shards.as_posix()) + more, encoding="utf-8")
    return file


def only_run(runs: Path) -> Path:
    """The one run directory under ``runs``."""
    (path,) = [p.parent for p in runs.glob("*/*/experiment.toml")]
    return path


def ledger(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(run: Path) -> dict[int, float]:
    """``train/loss`` by step; fails if the ledger has a step twice."""
    pairs = [(record["step"], record["train/loss"]) for record in ledger(run) if "train/loss" in record]
    assert len(pairs) == len(dict(pairs)), "the ledger has a step twice"
    return dict(pairs)


def metrics(run: Path, name: str) -> dict[int, float]:
    """An evaluation metric by step; fails if the ledger has a step twice."""
    pairs = [(record["step"], record[name]) for record in ledger(run) if name in record]
    assert len(pairs) == len(dict(pairs)), "a step was evaluated twice"
    return dict(pairs)


def assert_same_end(ours: Path, theirs: Path) -> None:
    """Check that two runs logged equal losses and metrics, and that their last checkpoints have equal parameters and
    optimizer state, bit for bit, and generators that draw equal numbers (their state has unused bytes)."""
    a, b = (sorted(run.glob("checkpoints/step_*"))[-1] for run in (ours, theirs))
    assert a.name == b.name
    for part in ("model", "optimizer"):
        x, y = (load_file(checkpoint / f"{part}.safetensors") for checkpoint in (a, b))
        assert x.keys() == y.keys()
        assert [name for name in x if not torch.equal(x[name], y[name])] == []
    draws = []
    for checkpoint in (a, b):
        generator = torch.Generator()
        generator.set_state(load_file(checkpoint / "rng.safetensors")["0/cpu"])
        draws.append(torch.rand(9, generator=generator).tolist())
    assert draws[0] == draws[1]
    assert losses(ours) == losses(theirs)
    assert metrics(ours, "val/bpb") == metrics(theirs, "val/bpb")


HEADER = "import attrs\nfrom nanochat_core import hookimpl, option\n@attrs.frozen\nclass Config: pass\n"


class Site:
    """Packages that a test makes, importable in this process during the test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.before = set(sys.modules)

    def add(self, package: str, plugin: str, point: str = "", requires: Sequence[str] = ()) -> Path:
        """Install a package whose module ``plugin.py`` has the code ``plugin``, with one entry point. Returns its
        source directory."""
        source = self.directory.parent / f"source-{package}"
        (source / package.replace("-", "_")).mkdir(parents=True)
        (source / package.replace("-", "_") / "__init__.py").touch()
        (source / package.replace("-", "_") / "plugin.py").write_text(HEADER + plugin, encoding="utf-8")
        (source / "pyproject.toml").write_text(
            f'[project]\nname = "{package}"\nversion = "1.0"\n'
            f"dependencies = {json.dumps(list(requires))}\n"
            f'[project.entry-points.nanochat]\n{point or "made_up"} = "{package.replace("-", "_")}.plugin"\n',
            encoding="utf-8",
        )
        install_fixture(source, self.directory)
        return source

    def change(self, package: str, plugin: str) -> None:
        """Replace the code of a package that was added, like another release."""
        file = self.directory / package.replace("-", "_") / "plugin.py"
        file.write_text(HEADER + plugin, encoding="utf-8")
        self.forget()
        importlib.invalidate_caches()

    def forget(self) -> None:
        for name in set(sys.modules) - self.before:
            if name.split(".")[0] in {p.name for p in self.directory.iterdir()}:
                del sys.modules[name]
