from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.fuzzing import snapshot
from helpers.hub_server import HubServer, serve
from helpers.waiting import wait_for

from nanochat_core import DataError

pytest.importorskip("huggingface_hub")

from huggingface_hub import constants, hf_hub_download

from nanochat_parquet import downloads, hub_requests
from nanochat_parquet.config import FinewebEduConfig, HubParquetConfig
from nanochat_parquet.hub import Hub
from nanochat_parquet.hub_source import HubSource, numbered

REPO = "someone/texts"
ROWS = 30


def texts_of(shard: int) -> list[str]:
    rng = random.Random(shard)
    return [f"shard {shard} row {i} " + "".join(rng.choices("abcdefgh ", k=6000)) for i in range(ROWS)]


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven shards of 180 KB."""
    directory = tmp_path_factory.mktemp("repo")
    for shard in range(7):
        table = pa.table({"text": texts_of(shard)})
        pq.write_table(table, directory / f"shard_{shard:05d}.parquet", row_group_size=10, compression="none")
    return directory


@pytest.fixture
def server(repo: Path) -> Iterator[HubServer]:
    with serve(repo, REPO) as server:
        yield server


def make(server: HubServer, directory: Path, shards: int = 3, **options: object) -> HubSource:
    hub = Hub(REPO, "main", directory / "state", endpoint=server.url, hub_cache=directory / "hub", backoff=0.02)
    return HubSource(hub, HubParquetConfig(repo=REPO, shards=shards, **options))  # type: ignore[arg-type]


def gets(server: HubServer) -> list[str]:
    """Names of the shards whose content was asked for, up to the end; not their footers."""
    return [name for name, part in server.ranges if part.endswith("-")]


def parts(directory: Path) -> list[Path]:
    """What has arrived of shards that are under way."""
    return [part for part in directory.rglob("files/*/*.part") if part.stat().st_size]


def fetched(directory: Path) -> set[bytes]:
    """The shards that are whole."""
    return {path.read_bytes() for path in directory.rglob("files/*/*") if path.suffix != ".part"}


def published(repo: Path, *names: str) -> set[bytes]:
    return {(repo / name).read_bytes() for name in names}


def test_length_and_fingerprint_before_the_data_are_here(server: HubServer, tmp_path: Path) -> None:
    source = make(server, tmp_path)
    assert (len(source.documents("train")), len(source.documents("val"))) == (3 * ROWS, ROWS)
    assert source.describe()["missing"] == 4
    before = source.fingerprint("train"), source.fingerprint("val")
    assert not gets(server)
    assert list(source.documents("train")) == [*texts_of(0), *texts_of(1), *texts_of(2)]
    assert source.documents("val")[3:5] == texts_of(6)[3:5]
    assert make(server, tmp_path / "elsewhere").fingerprint("train") == before[0]
    again = make(server, tmp_path)
    assert (again.fingerprint("train"), again.fingerprint("val")) == before
    assert make(server, tmp_path, shards=2).fingerprint("train") != before[0]
    assert sorted(gets(server)) == sorted([*numbered(3), "shard_00006.parquet"])  # each once


def test_reading_starts_while_later_shards_arrive(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "AHEAD", 2)
    server.speed = 2e6
    source = make(server, tmp_path, shards=6, workers=2)
    train = source.documents("train")
    assert train[0] == texts_of(0)[0]
    assert len(set(gets(server))) < 5
    wait_for(lambda: source.describe()["missing"] == 3)
    time.sleep(0.2)  # no more are asked for
    assert sorted(gets(server)) == [
        "shard_00000.parquet",
        "shard_00001.parquet",
        "shard_00002.parquet",
        "shard_00006.parquet",
    ]
    assert train[ROWS * 4] == texts_of(4)[0]  # what a reader waits for comes first
    assert "shard_00003.parquet" not in gets(server)


def test_a_preset_knows_its_names(server: HubServer, repo: Path, tmp_path: Path) -> None:
    hub = Hub(REPO, "main", tmp_path / "state", endpoint=server.url, hub_cache=tmp_path / "hub", backoff=0.02)
    source = HubSource(hub, FinewebEduConfig(shards=1), numbered(7))
    assert source.download(2) == []
    assert fetched(tmp_path) == published(repo, "shard_00000.parquet", "shard_00006.parquet")
    with pytest.raises(DataError, match=r"^shards: .* has no shard_00007\.parquet on the hub; lower data\.shards"):
        HubSource(hub, FinewebEduConfig(shards=1), numbered(8)).documents("train")


@pytest.mark.parametrize("fault", ["503", "drop", "truncate", "flip", "stall", "endless"])
def test_faults_are_mended(
    server: HubServer, repo: Path, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    source = make(server, tmp_path, shards=1)
    server.faults = [fault, fault] if fault != "stall" else [fault]
    assert source.download(2) == []
    assert server.faults == []
    assert fetched(tmp_path) == published(repo, "shard_00000.parquet", "shard_00006.parquet")


def test_what_can_not_be_had(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "PATIENCE", 0.05)
    source = make(server, tmp_path, shards=1)
    train = source.documents("train")
    server.faults = ["404"] * 2
    with pytest.raises(DataError, match=r"shard_00000\.parquet of someone/texts can't be fetched .* answers 404"):
        train[0]
    server.faults = []
    assert train[0] == texts_of(0)[0]  # asked again
    server.faults = ["503"] * 50
    failures = make(server, tmp_path / "elsewhere", shards=1).download(2)
    assert len(failures) == 2
    assert "after 6 attempts" in failures[0]


def test_a_reader_that_waits_says_so(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(downloads, "PATIENCE", 0.1)
    server.speed = 5e5
    make(server, tmp_path, shards=1).documents("train")[0]
    assert "waiting for shard_00000.parquet of someone/texts for 0 s: 0." in capsys.readouterr().err


def test_wrong_options(server: HubServer, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"^shards: .* has 7 shards, one of them for validation; set data\.shards to at most 6"
    ):
        make(server, tmp_path, shards=7).documents("train")
    with pytest.raises(DataError, match=r"^text_column: .* has no column 'words'; set it to one of 'text'"):
        make(server, tmp_path, text_column="words").documents("train")
    with pytest.raises(DataError, match=r"has no files that match '\*\.csv'"):
        make(server, tmp_path, files="*.csv").documents("train")
    for name in ("someone/else", "a b"):
        hub = Hub(name, "main", tmp_path, endpoint=server.url, backoff=10)
        with pytest.raises(DataError, match=r"^repo: .*(check data\.repo|write it as owner/name)"):
            HubSource(hub, HubParquetConfig(repo=name)).documents("train")
    assert not gets(server)


def test_without_the_hub(server: HubServer, tmp_path: Path) -> None:
    online = make(server, tmp_path, shards=2)
    online.download(2)
    server.down = True
    offline = make(server, tmp_path, shards=2)
    assert offline.fingerprint("train") == online.fingerprint("train")
    assert offline.documents("train")[ROWS:] == texts_of(1)
    assert offline.download(2) == []
    with pytest.raises(
        DataError, match=r"shard_00002\.parquet of someone/texts \(1 of 4 files\) are not on this machine"
    ):
        make(server, tmp_path, shards=3).documents("train")
    shutil.rmtree(tmp_path / "state")  # as when another program has filled the hub's cache
    with pytest.raises(DataError, match="can't be fetched from the hub"):
        make(server, tmp_path, shards=2).documents("train")


def test_damaged_copy_is_fetched_again(server: HubServer, repo: Path, tmp_path: Path) -> None:
    make(server, tmp_path, shards=1).download(2)
    content = (repo / "shard_00000.parquet").read_bytes()
    copy = tmp_path / "state" / "files" / "someone--texts" / hashlib.sha256(content).hexdigest()
    copy.write_bytes(content[:-10])
    source = make(server, tmp_path, shards=1)
    assert source.describe()["missing"] == 1
    assert source.documents("train")[0] == texts_of(0)[0]
    assert copy.read_bytes() == content


def test_the_cache_of_the_hub_is_read_and_left_as_it_is(server: HubServer, repo: Path, tmp_path: Path) -> None:
    cache, name = tmp_path / "hub", "shard_00000.parquet"
    hf_hub_download(REPO, name, repo_type="dataset", endpoint=server.url, cache_dir=cache)
    before = {path: path.lstat().st_mtime_ns for path in cache.rglob("*")}
    server.ranges.clear()
    source = make(server, tmp_path, shards=1)
    assert source.describe()["missing"] == 1
    assert source.documents("train")[0] == texts_of(0)[0]
    assert source.documents("val")[0] == texts_of(6)[0]
    assert gets(server) == ["shard_00006.parquet"]
    assert fetched(tmp_path) == published(repo, "shard_00006.parquet")
    server.down = True
    assert make(server, tmp_path, shards=1).documents("train")[:] == texts_of(0)
    assert {path: path.lstat().st_mtime_ns for path in cache.rglob("*")} == before


def test_a_part_that_is_damaged_or_from_a_server_without_ranges(server: HubServer, repo: Path, tmp_path: Path) -> None:
    whole = (repo / "shard_00000.parquet").read_bytes()
    files = tmp_path / "state" / "files" / "someone--texts"
    part = files / f"{hashlib.sha256(whole).hexdigest()}.{platform.node()}.part"
    for content, ranges in ((b"x" * 1000, True), (whole[:1000], False), (whole, True), (whole + b"x", True)):
        files.mkdir(parents=True)
        part.write_bytes(content)
        server.has_ranges = ranges
        assert make(server, tmp_path, shards=1).download(1) == []
        assert fetched(tmp_path) == published(repo, "shard_00000.parquet", "shard_00006.parquet")
        assert not part.exists()
        shutil.rmtree(files)


def test_room_is_checked_first(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        DataError, match=r"^shards: 2 files of someone/texts need 0\.0 GB, .* lower data\.shards, make room"
    ):
        make(server, tmp_path, shards=1).download(2)
    assert not gets(server)


def test_left_overs_of_killed_downloads_go(server: HubServer, tmp_path: Path) -> None:
    files = tmp_path / "state" / "files" / "someone--texts"
    files.mkdir(parents=True)
    for name, age in (("a.host.part", 7200), ("b.host.part", 5)):
        (files / name).write_bytes(b"half")
        os.utime(files / name, (time.time() - age,) * 2)
    make(server, tmp_path, shards=1).download(2)
    assert [path.name for path in files.glob("*.part")] == ["b.host.part"]


def test_threads_and_sources_share_the_downloads(server: HubServer, tmp_path: Path) -> None:
    server.speed = 4e6
    wrong = []

    def read(seed: int) -> None:
        train = make(server, tmp_path, shards=4).documents("train")
        for i in random.Random(seed).sample(range(4 * ROWS), 20):
            if train[i] != texts_of(i // ROWS)[i % ROWS]:
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sorted(set(gets(server))) == sorted(gets(server))


# ---------------------------------------------------------------------------------------------- a hub not to trust


def forge(server: HubServer, name: str = "a.parquet", sha: object = "c" * 40, **facts: object) -> None:
    """Let the server list its two files as small files of git, the first under ``name`` and with these facts."""
    entries: list[dict[str, object]] = []
    for listed, file in ((name, "a.parquet"), ("b.parquet", "b.parquet")):
        data = (server.directory / file).read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entries.append({"type": "file", "path": listed, "size": len(data), "oid": blob})
    entries[0] |= facts
    overview = {"sha": sha, "siblings": [{"rfilename": entry["path"]} for entry in entries]}
    server.forged = {"overview": json.dumps(overview).encode(), "paths-info": json.dumps(entries).encode()}


@pytest.fixture
def small(tmp_path: Path) -> Iterator[HubServer]:
    """A hub of two small files, ``a.parquet`` and ``b.parquet``."""
    (tmp_path / "repo").mkdir()
    for name in ("a", "b"):
        pq.write_table(pa.table({"text": [f"{name} {i}" for i in range(9)]}), tmp_path / "repo" / f"{name}.parquet")
    with serve(tmp_path / "repo", REPO) as server:
        yield server


@pytest.mark.parametrize(
    "facts",
    [
        {"oid": "OUTSIDE/victim"},
        {"lfs": {"oid": "OUTSIDE/victim", "size": 9}},
        {"lfs": {"oid": "../../../outside/victim", "size": 9}},
        {"lfs": {"oid": "a" * 63, "size": 9}},
        {"lfs": {"oid": "A" * 64, "size": 9}},
        {"lfs": {"oid": "a" * 64 + "\n", "size": 9}},
        {"lfs": {"oid": None}},
        {"oid": 7},
        {"size": -1},
        {"size": True},
        {"size": 10**400},
        {"size": "9"},
        {"name": "../outside/victim.parquet"},
        {"name": "OUTSIDE/victim.parquet"},
        {"name": "x\x1b[2J.parquet"},
        {"sha": "OUTSIDE"},
        {"sha": None},
        {"sha": ["c" * 40]},
    ],
)
def test_names_that_lead_elsewhere_are_refused(small: HubServer, tmp_path: Path, facts: dict[str, object]) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("victim", "a.parquet", "victim.parquet"):
        (outside / name).write_text("ours")
    before = snapshot(outside)
    forge(small, **json.loads(json.dumps(facts).replace("OUTSIDE", str(outside))))
    with pytest.raises(DataError, match=r"^the hub's answer can't be used: .*; check HF_ENDPOINT") as caught:
        make(small, tmp_path, shards=1).download(1)
    assert str(caught.value).isprintable()
    assert snapshot(outside) == before
    assert not list(tmp_path.rglob("state/files"))


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b"[" * 100_000, b'{"sha": 1' + b"0" * 5000 + b"}", b"\xff", b"{}"]
)
@pytest.mark.parametrize("answer", ["overview", "paths-info"])
def test_an_answer_that_is_none_is_refused(small: HubServer, tmp_path: Path, answer: str, body: bytes) -> None:
    small.forged = {answer: body}
    with pytest.raises(DataError, match=r"the hub's answer can't be used|has no a\.parquet, b\.parquet on the hub"):
        make(small, tmp_path, shards=1).download(1)


def test_an_answer_without_an_end_is_refused(small: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_requests, "JSON_BYTES", 1000)
    small.forged = {"overview": b" " * 1001}
    with pytest.raises(DataError, match="it has more than 1,000 bytes"):
        make(small, tmp_path, shards=1).download(1)


def test_the_digest_of_a_small_file_is_compared(small: HubServer, tmp_path: Path) -> None:
    forge(small)
    assert make(small, tmp_path, shards=1).download(1) == []
    assert len(fetched(tmp_path)) == 2
    forge(small, oid="d" * 40)
    (failure,) = make(small, tmp_path / "elsewhere", shards=1).download(1)
    assert "instead of dddd" in failure
    assert len(fetched(tmp_path / "elsewhere")) == 1


def test_a_record_that_somebody_changed_is_not_used(small: HubServer, tmp_path: Path) -> None:
    make(small, tmp_path, shards=1).download(1)
    (record,) = (tmp_path / "state").glob("*.json")
    for content in ("[]", '{"commit": "../x", "names": [], "files": {}}', "[" * 100_000):
        record.write_text(content)
        small.down = True
        with pytest.raises(DataError, match="can't be fetched from the hub"):
            make(small, tmp_path, shards=1).documents("train")


def test_a_footer_that_is_not_the_files_is_told_and_mended(small: HubServer, tmp_path: Path) -> None:
    make(small, tmp_path, shards=1).documents("train")  # keeps both footers
    first, second = (path for path in (tmp_path / "state" / "footers").rglob("*") if path.is_file())
    first.write_bytes(second.read_bytes())
    (failure,) = make(small, tmp_path, shards=1).download(1)
    assert "another footer" in failure
    assert make(small, tmp_path, shards=1).download(1) == []  # with the file's own


def test_redirects_have_an_end(small: HubServer, tmp_path: Path) -> None:
    small.circles = True
    with pytest.raises(DataError, match="redirects more than 10 times"):
        make(small, tmp_path, shards=1).download(1)


# ----------------------------------------------------------------------------------------------- real processes

# Importing torch takes seconds, so one process does it, and is copied for each command.
STARTER = """
import contextlib, json, os, signal, sys
import nanochat_core.interfaces.model, nanochat_core.cli.data, nanochat_core.config.load, nanochat_parquet.hub_source
from nanochat_core.cli import main
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    log, arguments = json.loads(line)
    pid = os.fork()
    if pid == 0:
        with open(log, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            code = main(arguments)
            print(f"exit code {code}")
        os._exit(0)
    print(pid, flush=True)
"""


class Starter:
    """Starts ``nanochat data`` in processes of their own."""

    def __init__(self, server: HubServer, directory: Path) -> None:
        places = {"HF_HOME": directory / "hf", "HF_HUB_CACHE": directory / "hub", "NANOCHAT_HOME": directory / "home"}
        env = {**os.environ, **{name: str(path) for name, path in places.items()}, "HF_ENDPOINT": server.url}
        self._process = subprocess.Popen(
            [sys.executable, "-c", STARTER],
            env={**env, "NANOCHAT_PLUGINS": "parquet"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._directory, self._count = directory, 0

    def start(self, *arguments: str) -> tuple[int, Path]:
        """The process, and the file with what it says."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._count += 1
        log = self._directory / f"log-{self._count}"
        command = ["data", *arguments, "--source", "hub_parquet", "--set", f"data.repo={REPO}"]
        self._process.stdin.write(json.dumps([str(log), command]) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline()), log

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture
def starter(server: HubServer, tmp_path: Path) -> Iterator[Starter]:
    starter = Starter(server, tmp_path)
    yield starter
    starter.close()


def said(log: Path) -> str:
    wait_for(lambda: log.exists() and "exit code" in log.read_text())
    return log.read_text()


def test_killed_three_times(server: HubServer, repo: Path, tmp_path: Path, starter: Starter) -> None:
    for kill in range(3):
        server.faults = ["", "stall"]  # the second of its shards stops half-way
        pid, log = starter.start("download", "-n", "5", "-w", "1")
        wait_for(lambda: not server.faults and any(part.stat().st_size > 50_000 for part in parts(tmp_path)))
        os.kill(pid, signal.SIGKILL)
        assert "exit code" not in log.read_text()
        assert len(fetched(tmp_path)) == kill + 1
    server.speed = 2e6
    before = len(gets(server))
    for _, log in [starter.start("download", "-n", "5", "-w", "2") for _ in range(2)]:  # two finish it between them
        assert "all files are present\nexit code 0" in said(log)
    assert len(gets(server)) == before + 3  # nothing twice
    resumed = [int(part[6:-1]) for _, part in server.ranges if part.endswith("-") and part != "bytes=0-"]
    assert len(resumed) == 3  # each time with what had arrived
    assert min(resumed) > 50_000
    assert not list(tmp_path.rglob("*.part"))
    assert fetched(tmp_path) == published(repo, *numbered(5), "shard_00006.parquet")
    assert "documents: 150 for training, 30 for validation" in said(starter.start("info", "-n", "5")[1])


def test_failing_exit_code_lists_what_is_missing(server: HubServer, starter: Starter) -> None:
    server.faults = ["404"]
    text = said(starter.start("download", "-n", "2", "-w", "1")[1])
    assert "1 file is still missing:\n  shard_00000.parquet: " in text
    assert "run the same command again; files that have arrived are kept\nexit code 2" in text


def test_offline_mode(server: HubServer, tmp_path: Path) -> None:
    make(server, tmp_path, shards=1).download(2)
    script = (
        "import sys; from pathlib import Path; from nanochat_parquet.hub import Hub\n"
        "from nanochat_parquet.hub_source import HubSource, numbered\n"
        "from nanochat_parquet.config import HubParquetConfig as Config\n"
        "state, cache = map(Path, sys.argv[1:])\n"
        "make = lambda n: HubSource(Hub('someone/texts', 'main', state, hub_cache=cache), Config(repo='', shards=n))\n"
        "print(len(make(1).documents('train')[:3]))\n"
        "try: make(2).documents('train')\n"
        "except Exception as error: print(error)"
    )
    words = [sys.executable, "-c", script, str(tmp_path / "state"), str(tmp_path / "hub")]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": server.url}
    before = server.requests.total()
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(
        "3\nshards: shard_00001.parquet of someone/texts (1 of 3 files) are not on this machine"
    )
    assert "HF_HUB_OFFLINE unset" in done.stdout
    assert server.requests.total() == before
