"""A Hugging Face hub on the loopback interface, with the routes that reading a data set needs, and with faults."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

BLOCK = 2**16


class HubServer(ThreadingHTTPServer):
    """A server of the files of one directory as the data set ``repo``, and of each file at ``/plain/NAME``.

    Attributes:
        faults: faults of the next GETs of whole files, one each: "503", "drop" (the connection breaks halfway),
            "stall", "truncate" (a complete response with fewer bytes than announced), "flip" (one wrong
            byte), "404", "endless" (it announces no length, and zeros follow the file until the client has had enough).
        spare_ends: whether requests for the last 64 KiB of a file, where its footer is, have no faults.
        speed: bytes per second of each connection; None is unlimited.
        requests: number of requests by "METHOD path".
        ranges: file name and Range header of each GET, in order.
        stalled: an event that ends stalls when it is set.
        circles: whether every answer is a redirect to the same address.
        down: whether connections are closed without a response.
        forged: bodies of answers that it gives in place of its own: "overview", "paths-info".
        has_ranges: whether it supports requests for all bytes from some position on; otherwise it sends the whole file.
    """

    daemon_threads = True

    def __init__(self, directory: Path, repo: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.directory, self.repo = directory, repo
        self.faults: list[str] = []
        self.spare_ends = True
        self.speed: float | None = None
        self.circles = self.down = False
        self.forged: dict[str, bytes] = {}
        self.has_ranges = True
        self.requests: Counter[str] = Counter()
        self.ranges: list[tuple[str, str]] = []
        self.stalled = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def names(self) -> list[str]:
        return sorted(p.name for p in self.directory.iterdir() if p.is_file())

    def commit(self) -> str:
        state = [(name, (self.directory / name).read_bytes()) for name in self.names()]
        return hashlib.sha1(repr([(n, hashlib.sha256(b).hexdigest()) for n, b in state]).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def parse_request(self) -> bool:
        if self.server.down:
            self.close_connection = True
            return False
        if not super().parse_request():
            return False
        if self.server.circles:
            self._json({}, 302, Location=self.path)
        return not self.server.circles

    def log_message(self, *_: Any) -> None:
        pass

    def _json(self, value: Any, code: int = 200, forged: bytes | None = None, **headers: str) -> None:
        body = json.dumps(value).encode() if forged is None else forged
        self.send_response(code)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _count(self) -> None:
        with self.server.lock:
            self.server.requests[f"{self.command} {self.path.partition('?')[0]}"] += 1

    def do_POST(self) -> None:
        self._count()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        paths = parse_qs(body).get("paths", [])
        if not re.fullmatch(rf"/api/datasets/{self.server.repo}/paths-info/\w+", self.path):
            self._json({"error": "no such route"}, 404)
            return
        found = [name for name in paths if name in self.server.names()]
        self._json([self._info(name) for name in found], forged=self.server.forged.get("paths-info"))

    def _info(self, name: str) -> dict[str, Any]:
        content = (self.server.directory / name).read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        lfs = {"oid": sha256, "size": len(content), "pointerSize": 134}
        return {"type": "file", "path": name, "size": len(content), "oid": sha256[:40], "lfs": lfs}

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self._count()
        path = unquote(self.path.partition("?")[0])
        api, resolve = f"/api/datasets/{self.server.repo}", f"/datasets/{self.server.repo}/resolve/"
        if path == api or path.startswith(f"{api}/revision/"):
            siblings = [{"rfilename": name} for name in self.server.names()]
            overview = {"id": self.server.repo, "sha": self.server.commit(), "siblings": siblings}
            self._json(overview, forged=self.server.forged.get("overview"))
        elif path.startswith(resolve):
            self._file(path.removeprefix(resolve).partition("/")[2])
        elif path.startswith("/plain/"):
            self._file(path.removeprefix("/plain/"))
        else:
            self._json({"error": "no such data set"}, 401, X_Error_Code="RepoNotFound")

    def _file(self, name: str) -> None:
        if name not in self.server.names():
            self._json({"error": "no such file"}, 404, X_Error_Code="EntryNotFound")
            return
        content = (self.server.directory / name).read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        fault = ""
        if self.command == "GET":
            with self.server.lock:
                self.server.ranges.append((name, self.headers.get("Range") or ""))
                end_only = asked is not None and int(asked[1]) >= len(content) - BLOCK
                if self.server.faults and not (end_only and self.server.spare_ends):
                    fault = self.server.faults.pop(0)
        if fault in ("404", "503"):
            self._json({"error": "not now"}, int(fault))
            return
        if asked is not None and not asked[2] and not self.server.has_ranges:
            asked = None
        start, end = (int(asked[1]), int(asked[2] or len(content) - 1) + 1) if asked else (0, len(content))
        body = content[start:end]
        if fault == "truncate":
            body = body[: len(body) // 2]
        if fault == "flip":
            body = body[:100] + bytes([body[100] ^ 1]) + body[101:]
        self.send_response(206 if asked else 200)
        self.send_header("X-Repo-Commit", self.server.commit())
        self.send_header("ETag", f'"{etag}"')
        self.send_header("Accept-Ranges", "bytes")
        if fault == "endless":
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(body)))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault in ("drop", "stall"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if fault == "stall":
                self.server.stalled.wait(60)
            self.close_connection = True
            return
        try:
            for i in range(0, len(body), BLOCK):
                self.wfile.write(body[i : i + BLOCK])
                if self.server.speed is not None:
                    time.sleep(BLOCK / self.server.speed)
            while fault == "endless":
                self.wfile.write(bytes(BLOCK))
        except OSError:  # the client has closed the connection
            self.close_connection = True


@contextmanager
def serve(directory: Path, repo: str = "someone/texts") -> Iterator[HubServer]:
    server = HubServer(directory, repo)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stalled.set()
        server.shutdown()
        server.server_close()
