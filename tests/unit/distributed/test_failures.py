"""A failure is shown once, by the rank that had it first."""

from __future__ import annotations

import io

import pytest
from torch.distributed import HashStore

from nanochat_core import ConfigError, DataError, Problem
from nanochat_core.distributed import failures
from nanochat_core.distributed.failures import Failures, is_lost_connection
from nanochat_core.distributed.store import RankFailure, RankStore

LOST = RuntimeError("[.../gloo/transport/tcp/pair.cc:547] Connection closed by peer")


def ranks(count: int) -> list[Failures]:
    store = HashStore()
    made = [Failures(rank, RankStore(store)) for rank in range(count)]
    for each in made:
        each.terminal = io.StringIO()
    return made


def shown(of: Failures) -> str:
    assert isinstance(of.terminal, io.StringIO)
    return of.terminal.getvalue()


def test_the_first_failure_alone_is_shown_and_gives_the_exit_code() -> None:
    first, second = ranks(2)
    assert second.report_once(DataError("no such shard")) == 2
    assert first.report_once(ValueError("something else")) == 2
    assert shown(second) == "rank 1: no such shard\n"
    assert shown(first) == ""


def test_a_mistake_of_the_first_rank_needs_no_rank_and_no_traceback() -> None:
    (alone,) = ranks(1)
    assert alone.report_once(ConfigError([Problem("", "must be positive", "train.seed")])) == 2
    assert shown(alone) == "train.seed: must be positive\n"


def test_any_other_exception_comes_with_its_traceback() -> None:
    (alone,) = ranks(1)
    assert alone.report_once(ValueError("no good")) == 1
    assert shown(alone).startswith("rank 0: ")
    assert shown(alone).endswith("ValueError: no good\n")


def test_only_the_first_report_of_a_rank_counts() -> None:
    (alone,) = ranks(1)
    alone.report_once(DataError("one"))
    assert alone.report_once(ValueError("two")) == 2
    assert shown(alone) == "one\n"


def test_a_lost_connection_is_silent_when_the_other_rank_has_said_why() -> None:
    first, second = ranks(2)
    first.report_once(ValueError("no good"))
    assert second.report_once(LOST) == 1
    assert shown(second) == ""


def test_a_lost_connection_is_told_when_nobody_has_said_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "MOMENT", 0.0)
    _, second = ranks(2)
    assert second.report_once(LOST) == 1
    assert shown(second).startswith("rank 1: another rank has died or does not answer")
    assert second.store.failure() == RankFailure(1, 1)


def test_what_is_a_lost_connection() -> None:
    assert is_lost_connection(LOST)
    assert not is_lost_connection(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_lost_connection(ValueError("gloo/"))
