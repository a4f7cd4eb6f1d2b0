"""A stand-in for Ollama: answers over HTTP what its API document says about blobs, create, copy and show."""

import hashlib
import json
import re
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class OllamaServer:
    def __init__(self) -> None:
        self.url = ""
        self.blobs: dict[str, int] = {}  # digest and size
        self.models: dict[str, dict[str, Any]] = {}  # the request that made each
        self.uploads = 0
        self.broken: str | None = None  # what creating a model fails with

    def upload(self, digest: str, content: bytes) -> tuple[int, list[dict[str, Any]]]:
        if digest != f"sha256:{hashlib.sha256(content).hexdigest()}":
            return 400, [{"error": "digest mismatch"}]
        self.blobs[digest] = len(content)
        self.uploads += 1
        return 201, []

    def create(self, wanted: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
        if not re.fullmatch(r"[a-z0-9._-]{1,80}(:[A-Za-z0-9._-]{1,80})?", wanted["model"]):
            return 400, [{"error": "invalid model name"}]
        if not wanted.get("files") or not set(wanted["files"].values()) <= self.blobs.keys():
            return 400, [{"error": "blob not found"}]
        if self.broken:
            return 200, [{"status": "parsing GGUF"}, {"error": self.broken}]
        self.models[wanted["model"]] = wanted
        return 200, [{"status": "parsing GGUF"}, {"status": "writing manifest"}, {"status": "success"}]

    def copy(self, wanted: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
        if wanted["source"] not in self.models:
            return 404, [{"error": f"model '{wanted['source']}' not found"}]
        self.models[wanted["destination"]] = self.models[wanted["source"]]
        return 200, []


@contextmanager
def running_ollama(port: int = 0) -> Generator[OllamaServer]:
    state = OllamaServer()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            known = self.path.removeprefix("/api/blobs/") in state.blobs
            self._answer(200 if known else 404, [])

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path.startswith("/api/blobs/"):
                return self._answer(*state.upload(self.path.removeprefix("/api/blobs/"), body))
            action = {"/api/create": state.create, "/api/copy": state.copy}[self.path]
            self._answer(*action(json.loads(body)))

        def _answer(self, status: int, lines: list[dict[str, Any]]) -> None:
            body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
            self.send_response(status)
            self.send_header("Content-Type", "application/x-ndjson")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        state.url = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield state
        server.shutdown()
        thread.join()
