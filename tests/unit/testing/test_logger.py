"""``check_logger`` notices each way of breaking the contract of loggers."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from helpers.fakes import FakeConfig, FakeLogger, read_fake

from nanochat_core import Logger, LoggerContext
from nanochat_core.testing import check_logger


class Doubles(FakeLogger):
    def log(self, record: Any) -> None:
        super().log(record)
        if record["step"] == 3:
            super().log(record)


class StartsAfresh(FakeLogger):
    """Forgets at resume what was before."""

    def __init__(self, config: Any, context: LoggerContext) -> None:
        super().__init__(config, attrs.evolve(context, start_step=0))


class StumblesOverTexts(Logger):
    def __init__(self, config: Any, context: LoggerContext) -> None: ...

    def log(self, record: Any) -> None:
        [float(value) for name, value in record.items() if name != "evaluator"]


@pytest.mark.parametrize(
    ("logger", "reason"),
    [(Doubles, "told twice"), (StartsAfresh, "has steps"), (StumblesOverTexts, "could not convert")],
)
def test_broken_loggers(logger: Any, reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        check_logger(logger, FakeConfig(), read_fake)


def test_a_good_logger() -> None:
    check_logger(FakeLogger, FakeConfig(), read_fake)


def test_check_logger_refuses_what_is_none() -> None:
    with pytest.raises(AssertionError, match=r"must return a nanochat_core\.Logger"):
        check_logger(lambda config, context: object(), None)  # type: ignore[arg-type,return-value]
