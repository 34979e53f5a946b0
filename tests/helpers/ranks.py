"""Real processes that form a gloo group, for tests of what ranks do together.

They stay for the next test, because importing torch takes seconds. Tests that use them have the mark
``xdist_group("ranks")``, so that one process of xdist starts them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from helpers.support import Result, Site
from nanochat_core import World
from nanochat_core.cli import main

SECONDS = 300  # that all ranks together may take
_ranks: list[tuple[BaseProcess, Connection]] = []


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call ``function(world, *arguments)`` in ``size`` processes. Returns the results in rank order.

    The function must be defined at module level, and its result must be readable by ``torch.load`` with
    ``weights_only``.
    """
    with tempfile.TemporaryDirectory() as directory:
        _together(_run, [(rank, size, directory, function, arguments) for rank in range(size)])
        return [torch.load(Path(directory, f"{rank}.pt")) for rank in range(size)]


def call_on_ranks(size: int, *arguments: object, site: Site | None = None) -> Result:
    """``nanochat ARGUMENTS`` on ``size`` ranks, without a launcher and one thread each.

    Args:
        site: packages that the ranks see, too.

    Returns:
        The highest exit code, what rank 0 printed, and what all ranks wrote to stderr.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    words = [str(word) for word in arguments]
    more = (words, os.environ["NANOCHAT_HOME"], None if site is None else site.directory)
    found = _together(_command, [(rank, size, store.port, *more) for rank in range(size)])
    return Result(max(code for code, _, _ in found), found[0][1], "".join(err for _, _, err in found))


def _together(function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> list[Any]:
    """``function(*task)`` for each task in a process of its own, at the same time."""
    while len(_ranks) < len(tasks):
        _ranks.append(_start())
    connections = [connection for _, connection in _ranks[: len(tasks)]]
    for connection, task in zip(connections, tasks, strict=True):
        connection.send((function, task))
    deadline = time.monotonic() + SECONDS
    waited, found, failures = set(connections), dict[Connection, Any](), list[str]()
    while waited and not failures and time.monotonic() < deadline:
        for connection in wait(list(waited), timeout=1):
            assert isinstance(connection, Connection)
            waited.remove(connection)
            try:
                failure, found[connection] = connection.recv()
            except EOFError:
                failure = "its process ended"
            failures += [f"rank {connections.index(connection)}: {failure}"] if failure else []
    if waited or failures:
        _end()
    assert not failures, "\n".join(failures)
    assert not waited, f"{len(waited)} of {len(tasks)} ranks were not done after {SECONDS} s"
    return [found[connection] for connection in connections]


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
            function, task = connection.recv()
        except EOFError:  # the tests are over
            return
        try:
            connection.send(("", function(*task)))
        except BaseException:
            connection.send((traceback.format_exc(), None))


def _run(rank: int, size: int, directory: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/group", rank=rank, world_size=size)
    try:
        result = function(World(rank, size, torch.device("cpu")), *arguments)
        torch.save(result, Path(directory, f"{rank}.pt"))
    finally:
        torch.distributed.destroy_process_group()


def _command(
    rank: int, size: int, port: int, arguments: list[str], home: str, site: Path | None
) -> tuple[int, str, str]:
    """What ``nanochat_core.distributed.launcher`` sets, and the command."""
    place = {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    os.environ.update(place, NANOCHAT_HOME=home)
    added = None if site is None else Site(site)
    if added is not None:
        sys.path.insert(0, str(added.directory))
        importlib.invalidate_caches()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        before = os.dup(2)
        os.dup2(err.fileno(), 2)  # a run writes there, too
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main(arguments)
        finally:
            faulthandler.disable()
            os.dup2(before, 2)
            os.close(before)
            for name in place:
                del os.environ[name]
            if added is not None:
                sys.path.remove(str(added.directory))
                added.forget()
        for file in (out, err):
            file.seek(0)
        return code, out.read(), err.read()
