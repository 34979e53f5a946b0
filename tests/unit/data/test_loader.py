"""Steps dealt to ranks, made ahead by a thread; validation rows."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import threading
import traceback
from collections import deque
from itertools import islice
from typing import Any

import pytest
import torch
from helpers.fakes import FakeTokenizer
from helpers.support import ROOT
from helpers.waiting import wait_for

from nanochat_core import DataError
from nanochat_core.data.loader import Step, TrainLoader
from nanochat_core.data.packing import Cursor, Encoder
from nanochat_core.data.validation import ValidationRows
from nanochat_core.interfaces.types import IGNORED, Batch

TOKENIZER = FakeTokenizer()
T = 16


def make_documents(count: int = 60) -> list[str]:
    rng = random.Random(7)
    return ["".join(rng.choices("abcdefgh ", k=rng.randrange(90))) for _ in range(count)]


def make_loader(documents: list[str] | None = None, G: int = 8, S: int = 4, B: int = 1, **more) -> TrainLoader:  # type: ignore[no-untyped-def]
    return TrainLoader(
        Encoder(documents or make_documents(), TOKENIZER),
        rows_per_step=G,
        lanes=S,
        max_seq_len=T,
        device_batch_size=B,
        **more,
    )


def take(loader: TrainLoader, count: int) -> list[Step]:
    with loader:
        return list(islice(loader, count))


def ids_of(step: Step) -> torch.Tensor:
    return torch.cat([batch.ids_BT for batch in step.batches])


def targets_of(step: Step) -> torch.Tensor:
    return torch.cat([batch.targets_BT for batch in step.batches])


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("train-loader")]


STREAM: dict[str, Any] = {}
BEST_FIT: dict[str, Any] = {"packing": "best_fit", "window": 3}


# S = 2 splits lanes across ranks: four ranks share two lanes.
@pytest.mark.parametrize("S", [1, 2, 4, 8])
@pytest.mark.parametrize(("R", "B"), [(1, 8), (1, 2), (2, 2), (4, 1), (8, 1)])
@pytest.mark.parametrize("how", [STREAM, {**BEST_FIT, "threads": 3}], ids=["stream", "best_fit"])
def test_global_batch_is_the_same_at_every_world_size(S: int, R: int, B: int, how: dict[str, Any]) -> None:
    one = take(make_loader(S=S, B=1, **how), 6)
    ranks = [take(make_loader(S=S, B=B, rank=r, world_size=R, **how), 6) for r in range(R)]
    for n, reference in enumerate(one):
        assert torch.equal(torch.cat([ids_of(steps[n]) for steps in ranks]), ids_of(reference))
        assert torch.equal(torch.cat([targets_of(steps[n]) for steps in ranks]), targets_of(reference))
        assert sum(steps[n].cropped for steps in ranks) == reference.cropped
        assert sum(steps[n].dropped for steps in ranks) == reference.dropped
        merged: dict[int, Cursor] = {}
        for steps in ranks:
            for lane, cursor in steps[n].cursors.items():
                assert merged.setdefault(lane, cursor) == cursor
        assert merged == reference.cursors


def test_batches() -> None:
    for step in take(make_loader(B=2), 3):
        assert len(step.batches) == 4
        for batch in step.batches:
            assert batch.ids_BT.shape == batch.targets_BT.shape == (2, T)
            assert batch.ids_BT.dtype == batch.targets_BT.dtype == torch.int64
            assert batch.ids_BT.is_contiguous()
            assert batch.targets_BT.is_contiguous()
            assert torch.equal(batch.ids_BT[:, 1:], batch.targets_BT[:, :-1])


@pytest.mark.parametrize("R", [1, 2, 4])
@pytest.mark.parametrize("how", [STREAM, BEST_FIT], ids=["stream", "best_fit"])
def test_resumes_from_any_step_at_any_world_size(R: int, how: dict[str, Any]) -> None:
    reference = take(make_loader(S=2, **how), 12)
    for start in (0, 4, 8):
        cursors = {lane: tuple(cursor) for lane, cursor in reference[start].cursors.items()}
        ranks = [take(make_loader(S=2, rank=r, world_size=R, cursors=cursors, **how), 3) for r in range(R)]
        for n in range(3):
            ids = torch.cat([ids_of(steps[n]) for steps in ranks])
            assert torch.equal(ids, ids_of(reference[start + 1 + n]))


def test_losses_are_counted() -> None:
    documents = [text[: 3 * (i % 5)] for i, text in enumerate(make_documents())]
    steps = take(make_loader(documents, S=1, **BEST_FIT), 12)
    assert sum(step.cropped for step in steps) > 0
    assert sum(step.dropped for step in steps) > 0
    assert all(step.cropped == step.dropped == 0 for step in take(make_loader(S=1), 12))


@pytest.mark.parametrize("how", [STREAM, BEST_FIT, {"threads": 2}], ids=["stream", "best_fit", "threads"])
@pytest.mark.parametrize("R", [1, 2])
def test_the_last_step_within_the_epochs_says_so(how: dict[str, Any], R: int) -> None:
    endless = take(make_loader(S=2, **how), 40)
    ends = []
    for rank in range(R):
        with make_loader(S=2, rank=rank, world_size=R, epochs=1, **how) as loader:
            for step in loader:
                ends.append(step.is_last)
                if step.is_last:
                    break
            assert all(cursor.epoch == 0 or cursor == (1, 0, 0) for cursor in step.cursors.values())
            with pytest.raises(DataError, match=r"data\.epochs"):
                next(loader)
    assert ends.count(True) == R
    count = len(ends) // R
    assert not any(step.is_last for step in endless)
    beyond = endless[count].cursors.values()
    assert any(cursor.epoch == 1 for cursor in beyond), "it could have given another step"


def test_epoch_goes_on() -> None:
    steps = take(make_loader(make_documents(8), S=1), 12)
    assert [step.epoch for step in steps] == sorted(step.epoch for step in steps)
    assert 0 <= steps[0].epoch < 1 < steps[-1].epoch
    assert steps[-1].cursors[0].epoch == int(steps[-1].epoch)


def test_empty_documents_are_a_bos_each() -> None:
    (step,) = take(make_loader([""] * 40), 1)
    assert set(ids_of(step).flatten().tolist()) == {TOKENIZER.bos_id}


class Failing(list[str]):
    """Documents whose file is damaged somewhere."""

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        found = super().__getitem__(index)
        if "bad" in found:
            raise DataError("shard_00003.parquet is damaged")
        return found


def test_errors_of_the_thread_surface_with_their_traceback() -> None:
    documents = Failing(["some text of a document"] * 40 + ["bad"])
    loader = make_loader(documents, G=1, S=1)
    assert len(list(islice(loader, 3))) == 3  # what comes before the damage is delivered
    with pytest.raises(DataError, match="shard_00003") as caught:
        deque(loader, maxlen=0)
    assert "in __getitem__" in "".join(traceback.format_exception(caught.value))
    with pytest.raises(DataError, match="shard_00003"):
        next(loader)
    assert not loader_threads()


@pytest.mark.parametrize("threads", [1, 2])
def test_close(threads: int) -> None:
    loader = make_loader(threads=threads)
    next(loader)
    assert loader_threads()
    loader.close()
    loader.close()
    assert not loader_threads()
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)
    make_loader().close()  # one that never started


def test_thread_ends_with_the_loader() -> None:
    next(make_loader(threads=2))
    gc.collect()
    wait_for(lambda: not loader_threads())


def test_interpreter_exits_while_the_thread_works() -> None:
    code = "from unit.data.test_loader import make_loader\nloader = make_loader(threads=2)\n"
    code += "next(loader)\nraise SystemExit(7)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT / "tests")
    assert (done.returncode, done.stderr) == (7, "")


@pytest.mark.parametrize(
    "wrong", [{"S": 3}, {"B": 3}, {"world_size": 3}, {"world_size": 4, "B": 4}, {"cursors": {0: Cursor(), 1: Cursor()}}]
)
def test_impossible_shares(wrong) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"can't be dealt|no cursors for lanes \[2, 3\]"):
        make_loader(**wrong)


def validation(rank: int = 0, R: int = 1, tokens: int = 30 * T, B: int = 4, count: int = 60) -> list[Batch]:
    rows = ValidationRows(
        make_documents(count),
        TOKENIZER,
        tokens=tokens,
        max_seq_len=T,
        device_batch_size=B,
        rank=rank,
        world_size=R,
    )
    batches = list(rows)
    assert len(batches) == len(rows)
    for first, second in zip(batches, rows, strict=True):  # again, from memory
        assert torch.equal(first.ids_BT, second.ids_BT)
        assert torch.equal(first.targets_BT, second.targets_BT)
    return batches


@pytest.mark.parametrize("R", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("count", [60, 3])
def test_validation_rows_are_dealt_by_row(R: int, count: int) -> None:
    rows = torch.cat([b.targets_BT for b in validation(count=count, B=1)])
    ranks = [validation(r, R, count=count) for r in range(R)]
    assert len({len(batches) for batches in ranks}) == 1
    for rank, batches in enumerate(ranks):
        assert all(b.ids_BT.shape == b.targets_BT.shape == (4, T) for b in batches)
        assert all(b.ids_BT.dtype == b.targets_BT.dtype == torch.int64 for b in batches)
        share, expected = torch.cat([b.targets_BT for b in batches]), rows[rank::R]
        assert torch.equal(share[: len(expected)], expected)
        assert (share[len(expected) :] == IGNORED).all()
        assert (torch.cat([b.ids_BT for b in batches]) >= 0).all()


def test_validation_rows_do_not_depend_on_how_many_are_asked_for() -> None:
    few, many = validation(tokens=8 * T), validation(tokens=16 * T)
    assert len(few) == 2
    assert len(many) == 4
    assert torch.equal(few[1].targets_BT, many[1].targets_BT)
    assert len(validation(tokens=1)) == 1
