"""Environment variables of launchers, whatever they hold: a place in a job, or an error that says what to do."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from helpers.fuzzing import inputs, well_behaved
from hypothesis import given
from hypothesis import strategies as st

from nanochat_core.distributed.environment import MOST_RANKS, find_place
from nanochat_core.errors import ConfigError

pytestmark = pytest.mark.fuzz

WORDS = st.one_of(
    st.sampled_from(
        ["", " ", "0", "1", "2", "3", "-1", "1.0", "1e3", "x", "²", "٣", "0x2", "9" * 5000, "65536", "127.0.0.1",
         "\x1b[2J", "\udce9", "cuda", "cpu", "gpu", "/proc/none", "~nobody-here", "relative"]
    ),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=9),
)  # fmt: skip
JOB = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
OTHERS = ("NANOCHAT_DEVICE", "NANOCHAT_HOME", "HOME", "COLUMNS", "TERM", "NO_COLOR", "TZ", "TORCHELASTIC_RESTART_COUNT")


@given(variables=st.dictionaries(st.sampled_from(JOB), WORDS))
@inputs(500)
def test_a_place_or_a_remedy(variables: dict[str, str], tried: Callable[[str], None]) -> None:
    tried("variables of jobs")
    with mock.patch.dict(os.environ, variables):
        try:
            place = find_place()
        except ConfigError as error:
            message = str(error)
            assert message.startswith("the environment variable ")
            assert "unset" in message
            assert message.isprintable()
            assert len(message) < 500
        else:
            assert 0 <= place.rank < place.size <= MOST_RANKS


@given(
    variables=st.dictionaries(st.sampled_from(OTHERS), WORDS),
    command=st.sampled_from(["show FILE", "runs", "data info FILE", "run FILE --nproc 2"]),
    job=st.sampled_from([{}, {}, {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "3", "RANK": "0"}, {"WORLD_SIZE": "x"}]),
)
@inputs(30)
def test_a_command_in_any_environment(
    tmp_path_factory: pytest.TempPathFactory,
    tiny: Path,
    variables: dict[str, str],
    command: str,
    job: dict[str, str],
    tried: Callable[[str], None],
) -> None:
    tried("environments of commands")
    if command.startswith("run ") and not job:
        job = {"WORLD_SIZE": "1"}  # no run is started
    directory = tmp_path_factory.mktemp("cwd")
    before = Path.cwd()
    os.chdir(directory)
    try:
        with mock.patch.dict(os.environ, {**variables, **job}):
            well_behaved(*(tiny if word == "FILE" else word for word in command.split()))
    finally:
        os.chdir(before)
    assert not (directory / "runs").exists()
