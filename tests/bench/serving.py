"""A model behind the gateway, next to the same file in xllamacpp alone and behind llama-cpp-python's own server.

Clients are processes of curl, which take next to nothing of the two cores that all of this shares.
"""

import json
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any

import httpx
import psutil

from tests.bench.figures import Figure, figure_of_pairs
from tests.bench.gateway import GATEWAY
from tests.bench.servers import run, running_server
from tests.support.platform import Platform, unused_ports

GROUP = "Answers of a model with 102 M parameters, q8_0"
SLOTS = 8
CONTEXT = 2048
TOKENS = 128
FIRST_WORDS = 60
LONG_PREFIX = "The homelab has a NAS, a router, two nodes and a printer. " * 60
PEER_PACKAGES = ["pydantic-settings", "python-dotenv", "sse-starlette", "starlette-context"]
"""What llama-cpp-python's server needs besides what is here."""
ENGINE = "ray::ServeReplica:forgearr:gguf"
ALONE, SERVER = "xllamacpp alone", "llama_cpp.server"


def figures(platform: Platform, reference: str, file: Path, rounds: int = 3) -> list[Figure]:
    """`engines.slots` of the platform must be SLOTS."""
    ours = f"{platform.url}/v1"
    _ask(ours, reference, 1)  # loads it
    found: list[Figure] = []
    with _bare_engine(file) as bare:
        for streams in (1, SLOTS):
            for kind, streamed in (("streamed", True), ("whole", False)):
                _ask(ours, reference, streams, streamed=streamed)
                bare(streams, _requests(streams))
                pairs = [
                    (
                        _ask(ours, reference, streams, streamed=streamed),
                        bare(streams, _requests(streams))["tokens_per_second"],
                    )
                    for _ in range(rounds)
                ]
                name = f"{streams} at once through the gateway, {kind}"
                found.append(figure_of_pairs(GROUP, name, "tokens/s", ALONE, pairs))
        found += _first_words(ours, reference, bare)
        alone = bare(1, _requests(1))["pss_mb"]
    with _peer_server(platform.home, file) as peer:
        _ask(peer, "any", 1)
        pairs = [(_ask(ours, reference, SLOTS), _ask(peer, "any", SLOTS)) for _ in range(rounds)]
    found.append(figure_of_pairs(GROUP, f"{SLOTS} at once through the gateway, streamed", "tokens/s", SERVER, pairs))
    found.append(_shared_prefix(ours, reference))
    (gateway,), (engine,) = platform.processes(GATEWAY), platform.processes(ENGINE)
    found.append(figure_of_pairs(GROUP, "memory of the engine (PSS)", "MB", ALONE, [(_pss(engine), alone)]))
    size = file.stat().st_size / 2**20
    found.append(
        figure_of_pairs(GROUP, "  … over the model's own size", "MB", ALONE, [(_pss(engine) - size, alone - size)])
    )
    heavy = sorted({library for library in ("torch", "llama", "mlflow") if _has_loaded(gateway, library)})
    note = f"of the libraries torch, llama and mlflow it has loaded: {', '.join(heavy) or 'none'}"
    found.append(Figure(GROUP, "memory of the gateway (PSS)", "MB", _pss(gateway), note, note=note))
    return found


def _ask(url: str, model: str, clients: int, *, streamed: bool = True) -> float:
    """Tokens per second of so many answers at once."""
    started = time.perf_counter()
    asking = [_curl(url, {**request, "model": model}, streamed) for request in _requests(clients)]
    said = sum(_tokens(process.communicate()[0], streamed) for process in asking)
    return said / (time.perf_counter() - started)


def _curl(url: str, request: dict[str, Any], streamed: bool) -> "subprocess.Popen[str]":
    if not streamed:
        request = {name: value for name, value in request.items() if not name.startswith("stream")}
    command = ["curl", "-sN", f"{url}/chat/completions", "-H", "Content-Type: application/json"]
    return subprocess.Popen([*command, "-d", json.dumps(request)], stdout=subprocess.PIPE, text=True)


def _tokens(answer: str, streamed: bool) -> int:
    if not streamed:
        return json.loads(answer)["usage"]["completion_tokens"]
    events = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith("data: {")]
    usages = [event["usage"]["completion_tokens"] for event in events if event.get("usage")]
    # llama-cpp-python's server tells none in a stream: each of its events is a token.
    return usages[-1] if usages else sum(bool(event["choices"][0]["delta"].get("content")) for event in events)


def _first_words(url: str, reference: str, bare: Any) -> list[Figure]:
    """From the question to the first word, one after the other."""
    requests = _requests(FIRST_WORDS, tokens=2)
    ours = [_first_ms(url, {**request, "model": reference}) for request in requests]
    alone = bare(1, requests)["first_ms"]
    return [
        figure_of_pairs(
            GROUP,
            f"to the first word, {name}",
            "ms",
            ALONE,
            [(quantiles(ours, n=100)[at], quantiles(alone, n=100)[at])],
        )
        for name, at in (("p50", 49), ("p99", 98))
    ]


def _first_ms(url: str, request: dict[str, Any]) -> float:
    with httpx.Client(timeout=60) as client:
        client.get(url.removesuffix("/v1") + "/ping")  # the connection is there
        started = time.perf_counter()
        with client.stream("POST", f"{url}/chat/completions", json=request) as answer:
            next(answer.iter_raw())
            return (time.perf_counter() - started) * 1000


def _shared_prefix(url: str, reference: str) -> Figure:
    """A long beginning that was just read is not read again."""

    def ask(prefix: str, question: str) -> float:
        messages = [{"role": "system", "content": prefix}, {"role": "user", "content": question}]
        request = {"model": reference, "messages": messages, "max_tokens": 1, "stream": True}
        return _first_ms(url, request)

    pairs: list[tuple[float, float]] = []
    for number in range(3):
        prefix = f"{number}. {LONG_PREFIX}"
        first = ask(prefix, "Where is the NAS?")
        pairs.append((ask(prefix, "Where is the router?"), first))
    return figure_of_pairs(
        GROUP, "to the first word, after a beginning that was read before", "ms", "the first time", pairs
    )


def _requests(count: int, tokens: int = TOKENS) -> list[dict[str, Any]]:
    return [
        {
            "messages": [{"role": "user", "content": f"Tell me about episode {number}."}],
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for number in range(count)
    ]


@contextmanager
def _bare_engine(file: Path) -> Generator[Any]:
    """A process with that model: asked something, so much at once, it tells how fast it was."""
    wanted = {"model": str(file), "context": CONTEXT, "slots": SLOTS, "port": unused_ports(1)[0]}
    script = str(Path(__file__).parent / "bare_engine.py")
    command = [sys.executable, script, json.dumps(wanted)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    requests, answers = process.stdin, process.stdout
    assert answers.readline().strip() == "ready"

    def ask(at_once: int, what: list[dict[str, Any]]) -> dict[str, Any]:
        print(json.dumps([at_once, what]), file=requests, flush=True)
        return json.loads(answers.readline())

    try:
        yield ask
    finally:
        process.kill()
        process.wait()
        requests.close()
        answers.close()


@contextmanager
def _peer_server(home: Path, file: Path) -> Generator[str]:
    """llama-cpp-python's server, with the packages that it needs in a folder of its own."""
    folder, port = home / "peer", unused_ports(1)[0]
    run([sys.executable, "-m", "pip", "install", "--quiet", "--target", folder, "--no-deps", *PEER_PACKAGES])
    command = [sys.executable, "-m", "llama_cpp.server", "--model", file, "--n_ctx", str(CONTEXT), "--port", str(port)]
    url = f"http://127.0.0.1:{port}/v1"
    with running_server(command, f"{url}/models", home / "llama-cpp-server.log", {"PYTHONPATH": str(folder)}):
        yield url


def _pss(process: psutil.Process) -> float:
    return process.memory_full_info().pss / 2**20


def _has_loaded(process: psutil.Process, library: str) -> bool:
    """Whether files of such a Python package, or of a native library of that name, are mapped into the process."""
    return any(f"/{library}" in place.path or f"/lib{library}" in place.path for place in process.memory_maps())
