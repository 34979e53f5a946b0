"""Event files, read back as TensorBoard reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.support import losses, metrics

from nanochat_core import LoggerContext
from nanochat_core.plugins.discovery import load_plugins

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def start(run: Path, start_step: int = 0, directory: Path | None = None):
    entry = load_plugins("tensorboard")["logger"].get("tensorboard")
    assert entry is not None
    experiment = {"model": {"plugin": "gpt", "depth": 4}}
    context = LoggerContext(run, "d4", "run-1", "nanochat", "arm", ("a", "b"), experiment, 100, start_step)
    return entry.load()(entry.config(directory=directory), context)


def read(directory: Path) -> EventAccumulator:
    events = EventAccumulator(str(directory))
    events.Reload()
    return events


def points(events: EventAccumulator, tag: str) -> list[tuple[float, int, float]]:
    return [(e.wall_time, e.step, e.value) for e in events.Scalars(tag)]


def test_scalars_and_texts_come_back(tmp_path):
    logger = start(tmp_path)
    logger.log({"step": 0, "time": 1000.5, "train/loss": 5.5, "train/epoch": 0})
    logger.log({"step": 1, "time": 1001.5, "train/loss": 4.5, "train/grad_norm": "inf"})
    logger.log({"step": 2, "time": 1002.5, "val/bpb": 1.25, "samples/0": "Hot *is*\n    cold"})
    logger.finish("finished")
    events = read(tmp_path / "tensorboard")
    assert points(events, "train/loss") == [(1000.5, 0, 5.5), (1001.5, 1, 4.5)]
    assert points(events, "val/bpb") == [(1002.5, 2, 1.25)]
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/epoch", "train/grad_norm", "val/bpb"}
    assert points(events, "train/grad_norm") == [(1001.5, 1, float("inf"))]
    (sample,) = events.Tensors("samples/0/text_summary")
    assert (sample.wall_time, sample.step) == (1002.5, 2)
    assert sample.tensor_proto.string_val[0].decode() == "    Hot *is*\n        cold"
    (status,) = events.Tensors("status/text_summary")
    assert status.tensor_proto.string_val[0].decode().strip() == "finished"
    (experiment,) = events.Tensors("experiment/text_summary")
    assert '"depth": 4' in experiment.tensor_proto.string_val[0].decode()


def test_a_resumed_run_replaces_the_steps_it_does_again(tmp_path):
    logger = start(tmp_path)
    for step in range(6):
        logger.log({"step": step, "time": 1000.0 + step, "train/loss": 10.0})
    logger.finish("failed")
    logger = start(tmp_path, start_step=4)
    for step in range(4, 8):
        logger.log({"step": step, "time": 2000.0 + step, "train/loss": 20.0})
    logger.finish("finished")
    losses = [(step, loss) for _, step, loss in points(read(tmp_path / "tensorboard"), "train/loss")]
    assert losses == [(step, 10.0 if step < 4 else 20.0) for step in range(8)]


def test_sending_a_run_again_doubles_nothing(tmp_path):
    for _ in range(2):
        logger = start(tmp_path)
        logger.log({"step": 0, "time": 1000.0, "train/loss": 5.0})
        logger.finish("finished")
    assert len(points(read(tmp_path / "tensorboard"), "train/loss")) == 1


def test_runs_that_share_a_directory_stay_apart(tmp_path):
    logger = start(tmp_path / "run", directory=tmp_path / "all")
    logger.log({"step": 0, "time": 1000.0, "train/loss": 5.0})
    logger.finish("finished")
    assert points(read(tmp_path / "all" / "d4" / "run-1"), "train/loss") == [(1000.0, 0, 5.0)]
    assert not (tmp_path / "run").exists()


def test_entry_tells_how_to_install_its_library():
    entry = load_plugins("tensorboard")["logger"].get("tensorboard")
    assert entry is not None
    assert entry.requires == ("tensorboard",)
    assert entry.install == "pip install 'nanochat-core[tensorboard]'"


def test_a_resumed_run_has_every_step_once(logged):
    events = read(logged / "tensorboard")
    for name, expected in (("train/loss", losses(logged)), ("val/bpb", metrics(logged, "val/bpb"))):
        found = [(step, value) for _, step, value in points(events, name)]
        assert [step for step, _ in found] == sorted(expected)
        assert dict(found) == pytest.approx(expected, rel=1e-6)
