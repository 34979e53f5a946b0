"""Console lines, as a terminal or a pipe gets them."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from nanochat_core import LoggerContext
from nanochat_core.plugins.discovery import load_plugins

STEP = {
    "step": 42,
    "time": 1.7e9,
    "train/loss": 6.0,
    "train/loss_ema": 5.234567,
    "train/grad_norm": 0.81234,
    "train/lrm": 1.0,
    "train/dt": 1.14567,
    "train/tok_per_sec": 573892.4,
    "train/mfu": 42.0512,
    "train/epoch": 0,
    "train/data_wait": 0.001,
    "train/peak_memory": 1000.0,
    "total_training_time": 48.0,
    "total_training_flops": 1e15,
}
LINE = (
    "step 00042/00100 (42.00%) | loss: 5.234567 | grad norm: 0.8123 | lrm: 1.00 | dt: 1145.67ms | "
    "tok/sec: 573,892 | mfu: 42.05 | total time: 0.80m | eta: 1.1m"
)


def console(num_iterations=100, start_step=0, **options):
    entry = load_plugins("console")["logger"].get("console")
    assert entry is not None
    context = LoggerContext(Path(), "d20", "id", "nanochat", "", (), {}, num_iterations, start_step)
    return entry.load()(entry.config(**options), context)


def printed(capsys, *records, **options) -> list[str]:
    logger = console(**options)
    for record in records:
        logger.log(record)
    logger.finish("finished")
    return capsys.readouterr().out.splitlines()


def without(record, *names):
    return {name: value for name, value in record.items() if name not in names}


def test_step_line(capsys):
    assert printed(capsys, STEP) == [LINE]


def test_what_is_unknown_is_left_out(capsys):
    assert printed(capsys, without(STEP, "train/mfu", "train/grad_norm")) == [
        LINE.replace(" | mfu: 42.05", "").replace(" | grad norm: 0.8123", "")
    ]


def test_epoch_shows_once_the_data_wrapped(capsys):
    assert printed(capsys, {**STEP, "train/epoch": 1}) == [LINE + " | epoch: 1"]


def test_own_moving_average_without_the_core_s(capsys):
    records = [{"step": step, "time": 0.0, "train/loss": loss} for step, loss in enumerate((4.0, 2.0, "nan"))]
    average = (0.9 * 4 + 2) / 1.9
    assert [line.split(" | ")[1] for line in printed(capsys, *records)] == [
        "loss: 4.000000",
        f"loss: {average:.6f}",
        f"loss: {average:.6f}",
    ]


def test_eta_forgets_a_slow_first_step(capsys):
    records = [
        {"step": step, "time": 0.0, "train/loss": 1.0, "train/dt": 60.0 if step == 0 else 6.0} for step in range(3)
    ]
    assert printed(capsys, *records, num_iterations=13)[-1].endswith("eta: 1.0m")


def test_every_nth_line_and_the_last(capsys):
    lines = printed(capsys, *[{**STEP, "step": step} for step in range(25)], num_iterations=25, log_every=10)
    assert [line[:16] for line in lines] == [f"step {step:05d}/00025" for step in (0, 10, 20, 24)]


def test_evaluations(capsys):
    record = {
        "step": 2000,
        "time": 0.0,
        "val/bpb": 1.82341,
        "core_metric": 0.22192,
        "core/arc_easy": 0.4,
        "core/piqa": 0.3512,
        "val/accuracy": 0.25,
        "tiny/loss": 1.5e-7,
        "train/bpb": 1.5,
        "val/count": 12345.0,
    }
    assert printed(capsys, record) == [
        "Step 02000 | Validation bpb: 1.8234",
        "Step 02000 | CORE metric: 0.2219",
        "Step 02000 | val/accuracy: 0.2500",
        "Step 02000 | tiny/loss: 1.5e-07",
        "Step 02000 | train/bpb: 1.5000",
        "Step 02000 | val/count: 12345",
        "Step 02000 | CORE tasks: arc_easy 0.4000, piqa 0.3512",
    ]


def test_what_is_not_finite_is_still_a_number(capsys):
    assert printed(capsys, {"step": 1, "time": 0.0, "val/bpb": "nan", "tiny/score": "-inf"}) == [
        "Step 00001 | Validation bpb: nan",
        "Step 00001 | tiny/score: -inf",
    ]
    (line,) = printed(capsys, {**STEP, "train/loss": "inf", "train/grad_norm": "nan"})
    assert "| loss: 5.234567 | grad norm: nan |" in line


def test_texts_stand_below_indented_and_harmless(capsys):
    texts = {"samples/0": "The capital\nof France\n", "samples/1": "red \x1b[31m\x00 ink é", "note": "done"}
    assert printed(capsys, {"step": 5, "time": 0.0, **texts, "val/bpb": 1.0}) == [
        "Step 00005 | Validation bpb: 1.0000",
        "Step 00005 | samples:",
        "    The capital",
        "    of France",
        "    red \\x1b[31m\\x00 ink é",
        "Step 00005 | note:",
        "    done",
    ]


def test_progress_bar_goes_to_stderr_and_starts_where_the_run_resumes(capsys):
    logger = console(progress=True, start_step=40)
    for step in (40, 41, 42):
        logger.log({**STEP, "step": step})
    logger.finish("preempted")
    logger.finish("preempted")  # harmless
    out, err = capsys.readouterr()
    assert out.splitlines()[2] == LINE
    assert "40/100" in err


@pytest.mark.parametrize(("progress", "bar"), [("auto", False), (False, False), (True, True)])
def test_no_bar_in_a_pipe_unless_asked_for(capsys, progress, bar):
    console(progress=progress).finish("finished")
    assert ("/100" in capsys.readouterr().err) == bar


SCRIPT = """
from pathlib import Path
from nanochat_console.config import ConsoleConfig
from nanochat_console.logger import Console
from nanochat_core import LoggerContext
c = Console(ConsoleConfig(), LoggerContext(Path(), "n", "i", "p", "", (), {}, 10, 0))
c.log({"step": 9, "time": 0.0, "train/loss": 1.0})
c.log({"step": 10, "time": 0.0, "samples/0": "caf\\u00e9 \\ufffd"})
c.finish("finished")
"""


def test_terminal_gets_a_bar_and_an_ascii_pipe_survives():
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    subprocess.run([sys.executable, "-c", SCRIPT], stdout=theirs, stderr=theirs, check=True, timeout=300)
    os.close(theirs)
    text = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "step 00009/00010 (90.00%) | loss: 1.000000" in text
    assert "0/10 " in text
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    piped = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, check=True, timeout=300)
    assert piped.stdout.splitlines()[-1] == b"    caf? ?"
    assert piped.stderr == b""
