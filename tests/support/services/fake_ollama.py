"""A fake Ollama. It implements Ollama's documented API of blobs, create, copy and models over HTTP."""

import hashlib
import json
import re
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class FakeOllama:
    def __init__(self) -> None:
        self.url = ""
        self.blobs: dict[str, int] = {}  # digest and size
        self.models: dict[str, dict[str, Any]] = {}  # by name, the request that created it
        self.uploads = 0
        self.broken: str | None = None  # the error of create and of completions
        self.installed: dict[str, list[str]] = {}  # by name, the chunks of its completion
        self.requests: list[dict[str, Any]] = []  # the requests of completions

    def upload(self, digest: str, content: bytes) -> tuple[int, list[dict[str, Any]]]:
        if digest != f"sha256:{hashlib.sha256(content).hexdigest()}":
            return 400, [{"error": "digest mismatch"}]
        self.blobs[digest] = len(content)
        self.uploads += 1
        return 201, []

    def create(self, request: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
        if not re.fullmatch(r"[a-z0-9._-]{1,80}(:[A-Za-z0-9._-]{1,80})?", request["model"]):
            return 400, [{"error": "invalid model name"}]
        if not request.get("files") or not set(request["files"].values()) <= self.blobs.keys():
            return 400, [{"error": "blob not found"}]
        if self.broken:
            return 200, [{"status": "parsing GGUF"}, {"error": self.broken}]
        self.models[request["model"]] = request
        return 200, [{"status": "parsing GGUF"}, {"status": "writing manifest"}, {"status": "success"}]

    def pull(self, request: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
        self.installed[request["model"]] = ["pulled"]
        layer = {"status": "pulling 8eeb52dfb3bb", "digest": "sha256:8eeb52dfb3bb", "total": 2142590208}
        return 200, [{"status": "pulling manifest"}, {**layer, "completed": 241970}, {"status": "success"}]

    def tags(self) -> dict[str, Any]:
        details = {"parent_model": "", "format": "gguf", "family": "llama", "quantization_level": "Q4_K_M"}
        common = {"modified_at": "2025-05-10T08:06:48.639712648-07:00", "size": 4683075271, "digest": "0a8c2665"}
        return {"models": [{"name": name, "model": name, **common, "details": details} for name in self.installed]}

    def running(self) -> dict[str, Any]:
        common = {"size": 6654289920, "expires_at": "2031-06-04T14:38:31.83753-07:00", "context_length": 4096}
        return {"models": [{"name": name, "model": name, **common} for name in self.installed]}

    def show(self, request: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
        model_info = {
            "general.architecture": "llama",
            "general.parameter_count": 8030261248,
            "llama.block_count": 32,
            "llama.context_length": 8192,
            "llama.embedding_length": 4096,
        }
        return 200, [{"template": "{{ .Prompt }}", "model_info": model_info, "capabilities": ["completion", "tools"]}]

    def complete(self, request: dict[str, Any], path: str) -> tuple[int, list[dict[str, Any]]]:
        self.requests.append(request)
        if request["model"] not in self.installed:
            return 404, [{"error": f"model '{request['model']}' not found"}]
        common = {"model": request["model"], "created_at": "2023-08-04T08:52:19.385406455-07:00"}
        final = {**common, "done": True, "done_reason": "stop", "total_duration": 10706818083}
        if path == "/api/generate" and not request.get("prompt"):
            return 200, [{**final, "response": ""}]
        if request.get("tools"):
            function = {"name": request["tools"][0]["function"]["name"], "arguments": {"soon": True}}
            parts = [{"message": {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}}]
        elif path == "/api/chat":
            parts = [{"message": {"role": "assistant", "content": chunk}} for chunk in self.installed[request["model"]]]
        else:
            parts = [{"response": chunk} for chunk in self.installed[request["model"]]]
        lines = [{**common, **part, "done": False} for part in parts]
        if self.broken:
            return 200, [*lines, {"error": self.broken}]
        empty = {"message": {"role": "assistant", "content": ""}} if path == "/api/chat" else {"response": ""}
        measured = {"load_duration": 6338219291, "prompt_eval_count": 26, "prompt_eval_duration": 130079000}
        return 200, [*lines, {**final, **empty, **measured, "eval_count": 259, "eval_duration": 4232710000}]

    def embed(self, request: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
        if any(len(text) > 1000 for text in request["input"]):
            return 400, [{"error": "the input length exceeds the context length"}]
        return 200, [{"embeddings": [[0.6, 0.8] for _ in request["input"]], "prompt_eval_count": 8}]

    def copy(self, request: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
        if request["source"] not in self.models:
            return 404, [{"error": f"model '{request['source']}' not found"}]
        self.models[request["destination"]] = self.models[request["source"]]
        return 200, []

    def delete(self, request: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
        if self.models.pop(request["model"], None) is None:
            return 404, [{"error": f"model '{request['model']}' not found"}]
        return 200, []


@contextmanager
def running_fake_ollama(port: int = 0) -> Generator[FakeOllama]:
    state = FakeOllama()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            exists = self.path.removeprefix("/api/blobs/") in state.blobs
            self._respond(200 if exists else 404, [])

        def do_GET(self) -> None:
            self._respond(200, [{"/api/tags": state.tags, "/api/ps": state.running}[self.path]()])

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path.startswith("/api/blobs/"):
                return self._respond(*state.upload(self.path.removeprefix("/api/blobs/"), body))
            if self.path in {"/api/chat", "/api/generate"}:
                return self._respond(*state.complete(json.loads(body), self.path))
            action = {
                "/api/create": state.create,
                "/api/copy": state.copy,
                "/api/pull": state.pull,
                "/api/show": state.show,
                "/api/embed": state.embed,
            }[self.path]
            self._respond(*action(json.loads(body)))

        def do_DELETE(self) -> None:
            self._respond(*state.delete(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        def _respond(self, status: int, lines: list[dict[str, Any]]) -> None:
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
