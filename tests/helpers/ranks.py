"""Real processes that form a gloo group, for tests of what ranks do together."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from nanochat_core import World

SECONDS = 120  # that all ranks together may take
_ranks: list[tuple[BaseProcess, Connection]] = []  # they stay for the next call: importing torch takes seconds


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(world, *arguments)`` in ``size`` processes; what each returned, in rank order.

    The function must stand at the top of a module, and return what ``torch.load`` reads with ``weights_only``.
    """
    while len(_ranks) < size:
        _ranks.append(_start())
    with tempfile.TemporaryDirectory() as directory:
        for rank, (_, connection) in enumerate(_ranks[:size]):
            connection.send((rank, size, directory, function, arguments))
        deadline = time.monotonic() + SECONDS
        waited = {connection: rank for rank, (_, connection) in enumerate(_ranks[:size])}
        failures: dict[int, str] = {}
        while waited and not failures and time.monotonic() < deadline:
            for connection in wait(list(waited), timeout=1):
                assert isinstance(connection, Connection)
                rank = waited.pop(connection)
                try:
                    failure = connection.recv()
                except EOFError:
                    failure = "its process ended"
                if failure:
                    failures[rank] = failure
        if waited or failures:
            _end()
        assert not failures, "\n".join(f"rank {rank}: {failure}" for rank, failure in failures.items())
        assert not waited, f"ranks {sorted(waited.values())} were not done after {SECONDS} s"
        return [torch.load(Path(directory, f"{rank}.pt")) for rank in range(size)]


def _start() -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_main, args=(theirs,), daemon=True)  # it ends with this process
    process.start()
    theirs.close()
    return process, ours


def _end() -> None:
    """Kill all: after a failure the others may wait for ever."""
    for process, connection in _ranks:
        process.kill()
        process.join()
        connection.close()
    _ranks.clear()


def _main(connection: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            task = connection.recv()
        except EOFError:  # the tests are over
            return
        try:
            _run(*task)
        except BaseException:
            connection.send(traceback.format_exc())
        else:
            connection.send("")


def _run(rank: int, size: int, directory: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/group", rank=rank, world_size=size)
    try:
        result = function(World(rank, size, torch.device("cpu")), *arguments)
        torch.save(result, Path(directory, f"{rank}.pt"))
    finally:
        torch.distributed.destroy_process_group()
