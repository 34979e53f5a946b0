"""Whatever a hub answers, files are written only where the source keeps its own, and errors are DataErrors."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.fuzzing import inputs, snapshot, time_limit
from helpers.hub_server import HubServer, serve
from hypothesis import given
from hypothesis import strategies as st

from nanochat_core import DataError

pytest.importorskip("huggingface_hub")

from nanochat_parquet.config import HubParquetConfig
from nanochat_parquet.hub import Hub
from nanochat_parquet.hub_source import HubSource

pytestmark = pytest.mark.fuzz
REPO = "someone/texts"
NAMES = ("a.parquet", "b.parquet")

WORDS = st.sampled_from(
    [
        "", ".", "..", "/", "OUTSIDE/victim", "OUTSIDE", "../outside/victim", "../../outside/a.parquet", "a" * 40,
        "a" * 64, "A" * 64, "a" * 63 + "\n", "0" * 5000, "a.parquet", "b.parquet", "x/../../a.parquet",
        "\x1b[2J.parquet", "\ud800.parquet", "-rf.parquet", "a\x00.parquet", "c" * 300 + ".parquet", "file",
    ]
)  # fmt: skip
NUMBERS = st.sampled_from([0, -1, 1, 9, 10**9, 2**50, 2**63, 10**400, 1.5, float("nan"), float("inf"), True])
SCALARS = st.one_of(WORDS, NUMBERS, st.none(), st.text(max_size=9))
VALUES = st.recursive(
    SCALARS, lambda v: st.one_of(st.lists(v, max_size=3), st.dictionaries(WORDS, v, max_size=3)), max_leaves=6
)
KEYS = st.sampled_from(["type", "path", "size", "oid", "lfs", "sha", "siblings", "rfilename", "else"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    directory = tmp_path_factory.mktemp("hub")
    for name in NAMES:
        pq.write_table(pa.table({"text": [f"{name} {i}" for i in range(9)]}), directory / name)
    with serve(directory, REPO) as server:
        yield server


@given(data=st.data())
@inputs(120)
def test_a_hub_can_not_write_outside(
    server: HubServer, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, tried: Callable[[str], None]
) -> None:
    tried("hub answers")
    home = tmp_path_factory.mktemp("fuzzed")
    outside = home / "outside"
    outside.mkdir()
    for name in ("victim", *NAMES):
        (outside / name).write_text("ours")
    before = snapshot(outside)

    def altered(answer: Any, place: str) -> bytes:
        """An answer with some of its values replaced."""
        for _ in range(data.draw(st.integers(0, 2), label=place)):
            if data.draw(st.integers(0, 9)) == 0:
                answer = data.draw(VALUES)
            elif isinstance(answer, dict):
                answer = {**answer, data.draw(KEYS): data.draw(VALUES)}
            elif answer and isinstance(answer, list):
                index = data.draw(st.integers(0, len(answer) - 1))
                entry = answer[index]
                key, value = data.draw(KEYS), data.draw(VALUES)
                answer[index] = {**entry, key: value} if isinstance(entry, dict) else value
        body = json.dumps(answer).replace("OUTSIDE", str(outside)).encode()
        return data.draw(st.sampled_from([body, body, body, body, body[:-1], b"\xff" + body, b"[" * 99999]))

    content = {name: (server.directory / name).read_bytes() for name in NAMES}
    digests = [hashlib.sha256(content[name]).hexdigest() for name in NAMES]
    entries = [
        {"type": "file", "path": name, "size": len(content[name]), "oid": "0" * 40, "lfs": {"oid": digest}}
        for name, digest in zip(NAMES, digests, strict=True)
    ]
    overview = {"sha": "c" * 40, "siblings": [{"rfilename": name} for name in NAMES]}
    server.forged = {"overview": altered(overview, "overview"), "paths-info": altered(entries, "paths-info")}
    server.faults = data.draw(st.lists(st.sampled_from(["endless", "flip", "truncate", "404"]), max_size=2))
    server.spare_ends = data.draw(st.booleans())
    hub = Hub(REPO, "main", home / "state", endpoint=server.url, hub_cache=home / "cache", backoff=0.0)
    source = HubSource(hub, HubParquetConfig(repo=REPO, shards=1))
    messages: list[str] = []
    with time_limit(60):
        try:
            messages += source.download(2)
            source.documents("train")
        except DataError as error:
            messages.append(str(error))
    for message in messages:
        assert message.isprintable()
        assert len(message) < 1000
    assert snapshot(outside) == before
    assert {path.name for path in home.iterdir()} <= {"outside", "state", "cache"}
    whole = [path for path in home.rglob("files/*/*") if path.suffix != ".part"]
    for path in whole:  # only what has the digest that names it
        content_of = path.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(content_of) + content_of).hexdigest()
        assert path.name in (hashlib.sha256(content_of).hexdigest(), blob)
    shutil.rmtree(home)
