"""Real processes in a gloo group, for tests of collectives."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nanochat_core import World


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call ``function(world, *arguments)`` in ``size`` processes. Returns the results in rank order.

    The function must be defined at module level, and its result must be readable by ``torch.load`` with
    ``weights_only``.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        processes = [
            context.Process(target=_main, args=(rank, size, directory, function, arguments)) for rank in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=120)
        for process in processes:
            if process.is_alive():
                process.kill()
        assert [p.exitcode for p in processes] == [0] * size, "a rank failed; its traceback is on stderr"
        return [torch.load(Path(directory, f"{rank}.pt")) for rank in range(size)]


def _main(rank: int, size: int, directory: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/group", rank=rank, world_size=size)
    result = function(World(rank, size, torch.device("cpu")), *arguments)
    torch.save(result, Path(directory, f"{rank}.pt"))
    torch.distributed.destroy_process_group()
