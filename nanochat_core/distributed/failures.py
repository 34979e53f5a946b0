"""The first failure of any rank is reported once and ends the others, which write to their own logs."""

from __future__ import annotations

import sys
import traceback
from typing import IO

import torch.distributed as dist

from nanochat_core.distributed.store import RankFailure, RankStore
from nanochat_core.errors import NanochatError

MOMENT = 3.0  # seconds in which our launcher notices that a rank has died, and marks it


class Failures:
    """A reporter of this rank's failure, which prints nothing if another rank failed earlier.

    Args:
        rank: of this process.
        store: shared with the other ranks.
    """

    def __init__(self, rank: int, store: RankStore) -> None:
        self.rank, self.store = rank, store
        self.terminal: IO[str] = sys.stderr
        self._code: int | None = None

    def report_once(self, error: BaseException) -> int:
        """Print the error if no other rank failed earlier. Returns the exit code of the first failure. Only the first
        call on a rank has an effect.

        Call it before connections to other ranks are closed: the other ranks look for the failure when theirs break.
        """
        if self._code is not None:
            return self._code
        is_ours, lost = isinstance(error, NanochatError), is_lost_connection(error)
        before = self.store.failure(MOMENT) if lost else None
        code = error.exit_code if isinstance(error, NanochatError) else 1
        first = before or self.store.mark_failure(RankFailure(self.rank, code))
        self._code = first.code
        if first.rank == self.rank:
            prefix = "" if is_ours and self.rank == 0 else f"rank {self.rank}: "
            text = _lost(error) if lost else str(error) if is_ours else "".join(traceback.format_exception(error))
            print(prefix + text.rstrip(), file=self.terminal, flush=True)
        return self._code


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error only means that another rank does not answer."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in ("gloo/", "NCCL"))


def _lost(error: BaseException) -> str:
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if "/torch/" not in frame.filename]
    where = f" in {own[-1].name} ({own[-1].filename}:{own[-1].lineno})" if own else ""
    said = str(error).strip().splitlines()[-1]
    return f"another rank has died or does not answer{where}: {said}"
