"""A Weights & Biases server on the loopback interface, with the parts that a run's history needs."""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer(ThreadingHTTPServer):
    """A server that accepts every key.

    Attributes:
        lines: lines of each run's history, by run and position; a new line replaces one at its position.
        exits: exit codes by run, in the order of their arrival.
        silent: an event; while it is set, no request is answered.
        closing: an event that ends requests when it is set.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lines: dict[str, dict[int, dict[str, Any]]] = {}
        self.exits: dict[str, list[int]] = {}
        self.silent = threading.Event()
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def rows(self, run: str) -> list[dict[str, Any]]:
        """The run's history in order of position."""
        return [row for _, row in sorted(self.lines.get(run, {}).items())]

    def handle_error(self, *_: object) -> None:
        """Ignore errors of closed connections."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        while self.server.silent.is_set():
            if self.server.closing.wait(0.05):
                return
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.path.endswith("/file_stream"):
            self._answer(self._stream(self.path.split("/")[-2], json.loads(body)))
        elif self.path.endswith("/graphql"):
            query = json.loads(body)
            named = re.search(r"(?:query|mutation)\s+(\w+)", query.get("query", ""))
            self._answer({"data": self._graphql(named[1] if named else "", query.get("variables") or {})})
        else:  # telemetry
            self._answer({})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer({})

    def _stream(self, run: str, content: dict[str, Any]) -> dict[str, Any]:
        history = content.get("files", {}).get("wandb-history.jsonl")
        if history:
            lines = self.server.lines.setdefault(run, {})
            lines.update(enumerate(map(json.loads, history["content"]), history["offset"]))
        if content.get("complete"):
            self.server.exits.setdefault(run, []).append(content["exitcode"])
        return {}

    def _graphql(self, name: str, variables: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "p", "name": "nanochat", "entity": {"id": "e", "name": "me"}}
        if name == "UpsertBucket":
            bucket = {"id": variables["name"], "name": variables["name"], "config": "{}", "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": variables["name"] not in self.server.lines}}
        if name == "RunResumeStatus":
            rows = self.server.rows(variables["name"])
            bucket = {
                "id": variables["name"], "name": variables["name"], "historyLineCount": len(rows),
                "eventsLineCount": 0, "logLineCount": 0, "historyTail": json.dumps([json.dumps(r) for r in rows[-1:]]),
                "eventsTail": "[]", "summaryMetrics": "{}", "config": "{}", "tags": [],
                "wandbConfig": json.dumps({"t": 1}),  # without it a run is considered never started
            }  # fmt: skip
            return {"model": {**project, "bucket": bucket if rows else None}}
        if name == "CreateRunFiles":
            files = [{"name": f, "uploadUrl": f"{self.server.url}/files/{f}"} for f in variables["files"]]
            return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
        if name == "Viewer":
            return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        return {"serverInfo": {"features": []}}

    def _answer(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve() -> Iterator[WandbServer]:
    server = WandbServer()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
