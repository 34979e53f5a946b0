"""Shards in an object store, as pyarrow's S3 client reads them from a server on loopback."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_core import DataContext, DataError
from nanochat_parquet.config import ParquetConfig
from nanochat_parquet.source import ParquetSource, build

pytest.importorskip("pyarrow._s3fs", reason="this pyarrow is built without S3")


class Store(BaseHTTPRequestHandler):
    """Lists and reads the files of ``directory``: its subdirectories are the buckets."""

    directory: Path
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        file = self.directory / bucket / key
        if not key:
            prefix = parse_qs(url.query).get("prefix", [""])[0]
            self._reply(200, self._listing(self.directory / bucket, prefix))
        elif not file.is_file():
            self._reply(404, b"")
        else:
            content = file.read_bytes()
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
            self._reply(206 if asked else 200, content[int(asked[1]) : int(asked[2]) + 1] if asked else content)

    def _listing(self, bucket: Path, prefix: str) -> bytes:
        names = [path.relative_to(bucket).as_posix() for path in sorted(bucket.rglob("*")) if path.is_file()]
        contents = "".join(
            f"<Contents><Key>{name}</Key><Size>{(bucket / name).stat().st_size}</Size></Contents>"
            for name in names
            if name.startswith(prefix)
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>".encode()

    def _reply(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What stands behind the question mark of a URL."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    (tmp_path / "bucket" / "texts").mkdir(parents=True)
    for shard in range(3):
        table = pa.table({"text": [f"shard {shard} row {i}" for i in range(20)]})
        pq.write_table(table, tmp_path / "bucket" / "texts" / f"shard_{shard}.parquet", row_group_size=8)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Store,), {"directory": tmp_path}))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"?endpoint_override=127.0.0.1:{server.server_address[1]}&scheme=http&region=here"
    server.shutdown()
    server.server_close()


def source(path: str) -> ParquetSource:
    return build(ParquetConfig(path), DataContext(cache_dir=Path("unused")))


def test_directories_and_patterns_of_a_bucket(options: str, tmp_path: Path) -> None:
    local = source(str(tmp_path / "bucket" / "texts"))
    for place in ("s3://bucket/texts", "s3://bucket/texts/shard_*.parquet"):
        remote = source(place + options)
        for split in ("train", "val"):
            assert list(remote.documents(split)) == list(local.documents(split))
        assert remote.describe()["files"] == 3
    pair = source("s3://bucket/texts/shard_[12].parquet" + options)
    assert pair.documents("val")[0] == "shard 2 row 0"
    assert pair.documents("train")[0] == "shard 1 row 0"
    with pytest.raises(DataError, match=r"s3://bucket/books.* holds no parquet files"):
        source("s3://bucket/books" + options)
