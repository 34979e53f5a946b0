"""What ranks post is read as the text of a stranger."""

from __future__ import annotations

import json

import pytest

from nanochat_core.distributed.watchdog import RankStatus


def test_a_status_is_what_was_posted() -> None:
    assert RankStatus.parse(json.dumps(["waits for rank 1", True])) == RankStatus("waits for rank 1", True)


@pytest.mark.parametrize(
    "text", ["", "x", "[]", "[1, 2]", '["a"]', '["a", 1]', "{}", "null", "[" * 100_000, "9" * 5000]
)
def test_another_text_is_none(text: str) -> None:
    assert RankStatus.parse(text) == RankStatus("says what no rank says")


def test_a_text_is_short_and_printable() -> None:
    assert RankStatus.parse(json.dumps(["\x1b[2J" + "x" * 10**6, False])) == RankStatus(" [2J" + "x" * 496)
