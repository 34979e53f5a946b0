"""Requests to stop: which signals, which of them hurry, and where they can't be followed at once."""

from __future__ import annotations

import os
import signal
import sys
import time
import weakref
from collections.abc import Iterator

import pytest

from nanochat_core.distributed import signals
from nanochat_core.distributed.signals import Stopped, StopRequest, stop_signals


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    with StopRequest() as request:
        yield request


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU])
def test_a_request_is_remembered_and_followed_where_nothing_is_lost(stop: StopRequest, number: int) -> None:
    os.kill(os.getpid(), number)
    assert stop.signal == number
    with pytest.raises(Stopped), stop.interruptible():
        raise AssertionError("the block begins")


def test_a_terminal_that_closes_under_nohup_asks_for_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in stop_signals()
        with StopRequest() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert request.signal is None
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGXCPU])
def test_signals_that_systems_repeat_hurry_nobody(
    stop: StopRequest, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "SAME_SECONDS", -1.0)  # each is later than the first one
    for each in (signal.SIGTERM, number, number):
        os.kill(os.getpid(), each)  # a second request would end this process
    assert stop.signal == signal.SIGTERM


def test_a_signal_after_the_end_changes_nothing(stop: StopRequest) -> None:
    stop.over()
    with stop.interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signal == signal.SIGTERM


class Deleted:
    """Gets a signal while it is deleted."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        sum(range(10))


class Referred:
    """Something to which a weak reference is held."""


@pytest.mark.parametrize("how", ["deleted", "weak"])
def test_a_request_in_a_place_that_loses_exceptions_is_followed_a_moment_later(
    stop: StopRequest, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    thing = Deleted() if how == "deleted" else Referred()
    if how == "weak":
        weakref.finalize(thing, os.kill, os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped), stop.interruptible():  # noqa: PT012
        del thing
        time.sleep(100)
    assert lost == []
