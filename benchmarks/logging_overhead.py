"""Cost of logging for a fast model: without loggers, with each, with all of them, and with one that hangs.

    python benchmarks/logging_overhead.py

Trains a model of a few thousand parameters (a few milliseconds per step) with each set of loggers. Once they have
started, windows of some seconds alternate: in one the loggers follow the ledger, in the next their processes are
stopped and records are written to a file that no logger follows. Neighbouring windows of one run can be compared on a
busy machine too, the more windows the better; the arm ``none`` shows the error of the comparison. The cost within the
training process and the cost of competition for cores are measured separately:

- ``record``: CPU microseconds per step that the training loop spends in ``Logs.record``: writing the ledger, checking
  the loggers' processes. Loggers have no other cost in the training process.
- ``loop``: CPU milliseconds per step of the loop's thread. It rises when loggers share a cache or a core with it.
- ``cores``: CPU seconds per second of the loggers' processes while they follow; ``behind``: records that the slowest of
  them has not received at the end.
- ``steps/s`` and ``cost``: medians of wall-clock time; the cost is that of a window against the windows before and
  after it, and includes competition for cores. ``noise`` is the difference of successive windows without loggers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import attrs
from small_experiment import small_experiment

EXPERIMENT = small_experiment(
    model={"depth": 1, "aspect_ratio": 32, "head_dim": 16},
    optimizer={"plugin": "adamw"},
    train={
        "max_seq_len": 64,
        "device_batch_size": 8,
        "total_batch_size": 512,
        "num_iterations": 10_000_000,
        "dtype": "float32",
    },
)
HANGS = """
import time
from nanochat_core import Logger
class Hangs(Logger):
    def __init__(self, config, context): ...
    def log(self, record): time.sleep(1000)
"""
PLUGIN = """
import attrs
from nanochat_core import hookimpl
@attrs.frozen
class Config: pass
@hookimpl
def nanochat_register_loggers(registry):
    registry.add("hangs", config=Config, factory="hanging_logger.logger:Hangs", summary="hangs")
"""


def table(plugin: str, **options: object) -> str:
    return "\n".join([f'\n[[loggers]]\nplugin = "{plugin}"', *(f"{k} = {json.dumps(v)}" for k, v in options.items())])


ARMS = {
    "none": "",
    "csv": table("csv"),
    "tensorboard": table("tensorboard"),
    "wandb": table("wandb", mode="offline"),
    "aim": table("aim"),
    "all": table("csv") + table("tensorboard") + table("wandb", mode="offline") + table("aim"),
    "hanging": table("hangs"),
}
PROBE = """
import contextlib, json, os, signal, sys, time
from pathlib import Path
from nanochat_core.cli import main
from nanochat_core.loggers.priority import family
from nanochat_core.loggers.progress import Progress, progress_file
from nanochat_core.runs.ledger import Ledger
from nanochat_core.loggers.run_log import Logs

out, starting, seconds, count, *arguments = sys.argv[1:]
record, unfollowed, windows, begun = Logs.record, Ledger(Path(out + ".jsonl")), [], time.perf_counter()

def follow(processes, yes):
    for process in processes:
        for pid in family(process.pid):
            os.kill(pid, signal.SIGCONT if yes else signal.SIGSTOP)

def cpu(processes):  # CPU seconds so far, of loggers and their child processes
    nanoseconds = 0
    for pid in (pid for process in processes for pid in family(process.pid)):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):  # it has ended
                nanoseconds += int((thread / "schedstat").read_text().split()[0])
    return nanoseconds / 1e9

def behind(processes):  # records in the ledger that a logger has not received
    directories = [(process.job.context.directory, process.name) for process in processes]
    offsets = [Progress.read(progress_file(directory, name)).offset for directory, name in directories]
    return (directories[0][0] / "metrics.jsonl").read_bytes()[min(offsets):].count(b"\\n") if processes else 0

def measured(self, step, values):
    global used
    before = time.thread_time()
    if windows and windows[-1]["followed"]:
        record(self, step, values)
    elif windows:
        unfollowed.write(step, values)
    after, now = time.thread_time(), time.perf_counter()
    if windows:
        windows[-1]["steps"].append((now, after, after - before))
    if now > begun + float(starting) + len(windows) * float(seconds):
        followed = len(windows) % 2 == 0
        if windows:
            windows[-1]["loggers"] = cpu(self._processes) - used
            windows[-1]["behind"] = behind(self._processes)
        used = cpu(self._processes)
        follow(self._processes, followed or len(windows) == int(count))
        if len(windows) == int(count):
            os.kill(os.getpid(), signal.SIGTERM)
        windows.append({"followed": followed, "steps": [(time.perf_counter(), time.thread_time(), 0.0)]})

Logs.record = measured
main(["run", *arguments])
Path(out).write_text(json.dumps(windows[:int(count)]))
"""


def install_hanging_logger(site: Path) -> None:
    (site / "hanging_logger").mkdir()
    (site / "hanging_logger" / "__init__.py").touch()
    (site / "hanging_logger" / "plugin.py").write_text(PLUGIN)
    (site / "hanging_logger" / "logger.py").write_text(HANGS)
    info = site / "hanging_logger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hanging-logger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[nanochat]\nhangs = hanging_logger.plugin\n")


@attrs.frozen
class Window:
    """Measurements of one window.

    Args:
        followed: whether the loggers followed the ledger.
        wall: seconds per step.
        loop: CPU seconds per step of the loop's thread.
        record: CPU seconds per step within ``Logs.record``.
        cores: CPU seconds per second of the loggers.
        behind: records that the slowest logger has not received at the end.
    """

    followed: bool
    wall: float
    loop: float
    record: float
    cores: float
    behind: int

    @classmethod
    def read(cls, followed: bool, steps: list[tuple[float, float, float]], loggers: float, behind: int) -> Window:
        (first, cpu, _), (last, cpu_at_end, _) = steps[0], steps[-1]
        count = len(steps) - 1
        recorded = statistics.median(recorded for _, _, recorded in steps[1:])
        loop = (cpu_at_end - cpu) / count
        return cls(followed, (last - first) / count, loop, recorded, loggers / (last - first), behind)


def measure(directory: Path, arm: str, starting: float, seconds: float, count: int) -> list[Window]:
    file, out = directory / f"{arm}.toml", directory / f"{arm}.json"
    file.write_text(EXPERIMENT + ARMS[arm])
    numbers = [str(starting), str(seconds), str(count)]
    command = [sys.executable, "-c", PROBE, str(out), *numbers, str(file), "--runs-dir", str(directory / "runs")]
    site = os.pathsep.join(filter(None, (str(directory / "site"), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": site, "NANOCHAT_DEVICE": "cpu", "WANDB_SILENT": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if not out.exists():
        raise SystemExit(done.stdout + done.stderr)
    return [Window.read(**window) for window in json.loads(out.read_text())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", default=",".join(ARMS), help="sets of loggers, separated by commas")
    parser.add_argument(
        "--starting", type=float, default=20.0, help="seconds before the first window, in which loggers start"
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a window")
    parser.add_argument("--windows", type=int, default=21, help="number of windows of each run")
    options = parser.parse_args()
    names = ("steps/s", "none", "cost", "noise", "ms loop", "none", "us record", "cores", "behind")
    print(f"{'loggers':12}" + "".join(f"{name:>10}" for name in names))
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "site").mkdir()
        install_hanging_logger(directory / "site")
        for arm in options.arms.split(","):
            windows = measure(directory, arm, options.starting, options.seconds, options.windows)
            line(arm, windows[0::2], windows[1::2])


def line(arm: str, following: list[Window], none: list[Window]) -> None:
    """Print one line of the table, from alternating windows, the first with loggers."""
    median = statistics.median
    costs = [2 * w.wall / (a.wall + b.wall) - 1 for w, a, b in zip(following[1:], none, none[1:], strict=False)]
    noise = median(abs(b.wall / a.wall - 1) for a, b in itertools.pairwise(none))
    wall, wall_none = median(w.wall for w in following), median(w.wall for w in none)
    loop, loop_none = median(w.loop for w in following), median(w.loop for w in none)
    rates = f"{1 / wall:10.1f}{1 / wall_none:10.1f}{100 * median(costs):+9.1f}%{100 * noise:9.1f}%"
    cpu = f"{1000 * loop:10.3f}{1000 * loop_none:10.3f}{1e6 * median(w.record for w in following):10.1f}"
    work = f"{median(w.cores for w in following):10.3f}{following[-1].behind:10}"
    print(f"{arm:12}{rates}{cpu}{work}", flush=True)


if __name__ == "__main__":
    main()
