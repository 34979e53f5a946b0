"""``check_data_source`` notices each way of breaking the contract of data sources."""

from __future__ import annotations

from typing import Any

import pytest

from nanochat_core import DataContext, DataSource
from nanochat_core.testing import check_data_source


class Lines(DataSource):
    def __init__(self, config: object, context: DataContext) -> None:
        self.context = context

    def documents(self, split: Any) -> Any:
        return [f"{split} {i}" for i in range(20)]


class NoValidation(Lines):
    def documents(self, split: Any) -> Any:
        return super().documents(split) if split == "train" else []


class Shuffles(Lines):
    count = 0

    def documents(self, split: Any) -> Any:
        Shuffles.count += 1
        return [f"{split} {i} {Shuffles.count}" for i in range(20)]


class Streams(Lines):
    def documents(self, split: Any) -> Any:
        return iter(super().documents(split))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (NoValidation, "val has no documents"),
        (Shuffles, "a second instance has different documents"),
        (Streams, "must return a sequence of texts"),
    ],
)
def test_broken_data_sources(source: Any, reason: str) -> None:
    check_data_source(Lines, None)
    with pytest.raises(AssertionError, match=reason):
        check_data_source(source, None)


def test_check_data_source_refuses_what_is_none() -> None:
    with pytest.raises(AssertionError, match=r"must return a nanochat_core\.DataSource"):
        check_data_source(lambda config, context: object(), None)  # type: ignore[arg-type,return-value]
