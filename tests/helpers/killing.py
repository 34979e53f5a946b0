"""Runs of several ranks that are traced, killed at a chosen event, and started again, with killer/sitecustomize.py."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import attrs
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from helpers.support import assert_same_end, losses, metrics
from nanochat_core.runs.checkpoint import verify

KILLER = Path(__file__).parent / "killer"
SECONDS = 600  # a launch takes a few seconds, but the machine may be busy
SAVE_EVERY, KEEP_LAST, KEEP_EVERY = 3, 2, 12

EXPERIMENT = """
[run]
name = "killed"

[tokenizer]
plugin = "bpe"
vocab_size = 300

[data]
plugin = "parquet"
path = "{shards}"
packing = "best_fit"
packing_window = 8
cache = true

[model]
plugin = "gpt"
depth = 1
aspect_ratio = 32
head_dim = 16

[optimizer]
plugin = "muon_adamw"

[train]
max_seq_len = 32
device_batch_size = 2
total_batch_size = 256
num_iterations = {steps}
dtype = "float32"
compile = false

[checkpoint]
save_every = {save_every}
keep_last = {keep_last}
keep_every = {keep_every}
keep_best = 1
asynchronous = {asynchronous}

[[evaluators]]
plugin = "bpb"
every = {save_every}
eval_tokens = 512

[[evaluators]]
plugin = "samples"
every = 6
prompts = ["one, "]
max_new_tokens = 4
"""


def write_killed(directory: Path, steps: int, asynchronous: bool) -> Path:
    """Write the experiment and its data, documents of made-up words. Returns the experiment's file."""
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(60)]
    documents = [" ".join(draw.choices(words, k=draw.randint(5, 60))) for _ in range(200)]
    shards = directory / "shards"
    shards.mkdir()
    for index, texts in enumerate((documents[:180], documents[180:])):
        pq.write_table(pa.table({"text": texts}), shards / f"shard_{index:05d}.parquet")
    text = EXPERIMENT.format(
        shards=shards.as_posix(), steps=steps, asynchronous=str(asynchronous).lower(), save_every=SAVE_EVERY,
        keep_last=KEEP_LAST, keep_every=KEEP_EVERY,
    )  # fmt: skip
    file = directory / "killed.toml"
    file.write_text(text)
    return file


@attrs.frozen
class Point:
    """An event: the ``nth`` time that a rank reaches a phase."""

    rank: int
    phase: str
    nth: int = 1
    what: str = "rank"  # "job", "stop"

    def __str__(self) -> str:
        return f"{self.what} at {self.phase!r} no. {self.nth} of rank {self.rank}"


@attrs.frozen
class Launch:
    """Result of a launch: exit code, output, whether the event occurred, and the phases of each rank in order."""

    code: int
    out: str
    err: str
    struck: bool
    trace: dict[int, list[str]]

    def counts(self) -> Counter[tuple[int, str]]:
        return Counter((rank, phase) for rank, phases in self.trace.items() for phase in phases)


@attrs.define
class Place:
    """Directories in which one experiment is run repeatedly, with its own ``NANOCHAT_HOME``."""

    file: Path
    directory: Path
    nproc: int = 2
    saved: list[Path] = attrs.field(factory=list)  # checkpoints that all launches reported as saved

    def __attrs_post_init__(self) -> None:
        for path in (self.runs, self.home):
            path.mkdir(parents=True)

    @property
    def runs(self) -> Path:
        return self.directory / "runs"

    @property
    def home(self) -> Path:
        return self.directory / "home"

    def run(self) -> Path:
        """The newest run directory that has an experiment."""
        return max(self.runs.glob("*/*/experiment.toml"), key=lambda p: p.parent.name).parent

    def launch(self, point: Point | None = None, cut: float = 0.5, more: tuple[str, ...] = ()) -> Launch:
        """Run ``nanochat run --resume auto`` to its end or to the event."""
        scratch = self.directory / "scratch"
        scratch.mkdir(exist_ok=True)
        for old in scratch.iterdir():
            old.unlink()
        spec: dict[str, Any] = {"directory": str(scratch), "roots": [f"{self.runs}/", f"{self.home}/"], "cut": cut}
        if point is not None:
            spec |= attrs.asdict(point)
        path = os.pathsep.join(filter(None, (str(KILLER), os.environ.get("PYTHONPATH", ""))))
        arguments = [sys.executable, "-m", "nanochat_core", "run", str(self.file), "--runs-dir", str(self.runs)]
        arguments += ["--resume", "auto", "--nproc", str(self.nproc), *more]
        environment = {
            **os.environ, "PYTHONPATH": path, "NANOCHAT_KILLER": json.dumps(spec), "NANOCHAT_HOME": str(self.home),
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        out, err = self.directory / "out", self.directory / "err"  # remaining processes would keep a pipe open
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(arguments, env=environment, stdout=stdout, stderr=stderr)
            try:
                code = process.wait(SECONDS)
            finally:
                process.kill()
                process.wait()
                _end_workers(scratch)
        said = out.read_text()
        self.saved += [Path(path) for path in re.findall(r"^saved (.*)$", said, re.MULTILINE)]
        trace = {r: f.read_text().splitlines() for r in range(self.nproc) if (f := scratch / f"trace.{r}").exists()}
        return Launch(code, said, err.read_text(), (scratch / "struck").exists(), trace)

    def leftovers(self) -> set[Path]:
        """Paths that should exist only while a process writes them."""
        hidden = set(self.runs.rglob(".*"))
        starts = {path for path in self.runs.glob("*/*") if not (path / "experiment.toml").exists()}
        keys = {path for path in self.home.glob("tokenizers/*") if re.search(r"\.[0-9a-f]{8}$", path.name)}
        return hidden | starts | keys | set(self.home.glob("tokenizers/.*"))

    def assert_nothing_lost(self) -> None:
        """Check that all checkpoints are complete, and that reported ones exist if they must be kept."""
        for checkpoint in self.runs.glob("*/*/checkpoints/step_*"):
            assert verify(checkpoint) == ""
        for run in {path.parents[1] for path in self.saved}:
            steps = sorted({int(path.name[5:]) for path in self.saved if path.parents[1] == run})
            for step in steps:
                if step in steps[-KEEP_LAST:] or (step > 0 and step % KEEP_EVERY == 0):
                    assert (run / f"checkpoints/step_{step:06d}").is_dir(), f"step {step} was reported as saved"

    def assert_ended_like(self, whole: Path, *, stopped: bool = False) -> None:
        """Check that the run equals an uninterrupted one, and that nothing else is left.

        Args:
            stopped: a signal may be followed a step late when the machine is busy, and the saved step then takes
                a place among the newest: compare only the last checkpoint and those that ``keep_every`` keeps.
        """
        run = self.run()
        assert json.loads((run / "status.json").read_text())["status"] == "finished"
        assert_same_end(run, whole)
        assert metrics(run, "samples/0") == metrics(whole, "samples/0")
        assert list(losses(run)) == list(range(len(losses(whole))))
        last = sorted(p.name for p in whole.glob("checkpoints/*"))[-1]

        def files(path: Path) -> list[Path]:
            found = [p.relative_to(path) for p in path.rglob("*") if p.name != "metrics.rewound.jsonl"]
            steps = [(p, p.parts[1]) for p in found if len(p.parts) > 1 and p.parts[0] == "checkpoints"]
            other = {p for p, step in steps if stopped and step != last and int(step[5:]) % KEEP_EVERY}
            return sorted(p for p in found if p not in other)

        a, b = (load_file(path / "checkpoints" / last / "rng.safetensors") for path in (run, whole))
        assert a.keys() == b.keys()
        assert [name for name in a if _draws(a[name]) != _draws(b[name])] == []
        assert set(files(run)) ^ set(files(whole)) == set()
        assert self.leftovers() == set()
        rewound = run / "metrics.rewound.jsonl"
        lines = rewound.read_text().splitlines() if rewound.exists() else []
        assert len(lines) == len(set(lines))
        assert all("step" in json.loads(line) for line in lines)


def _draws(state: torch.Tensor) -> list[float]:
    generator = torch.Generator()
    generator.set_state(state)
    return torch.rand(9, generator=generator).tolist()


def _end_workers(scratch: Path) -> None:
    """Kill workers that outlived their launcher, such as those of a launch that took too long."""
    for file in scratch.glob("*.pid"):
        with contextlib.suppress(OSError, ValueError):  # it has ended
            pid = int(file.read_text())
            if str(scratch) in Path(f"/proc/{pid}/environ").read_text(errors="replace"):
                os.kill(pid, signal.SIGKILL)
