"""A model behind the gateway, next to the same file in xllamacpp alone; and what the processes take in memory."""

import json
import subprocess
import sys
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.bench.figures import Figure, figure_of_pairs
from tests.platform import Platform, unused_ports

GROUP = "Answers of a model with 102 M parameters, q8_0"
SLOTS = 8
CONTEXT = 2048
TOKENS = 128
GATEWAY, ENGINE = "ray::ServeReplica:forgearr:gateway", "ray::ServeReplica:forgearr:gguf"


def figures(platform: Platform, reference: str, file: Path, rounds: int = 3) -> list[Figure]:
    """`engines.slots` of the platform must be SLOTS."""
    _ask(platform, reference, 1)  # loads it
    found: list[Figure] = []
    with _bare_engine(file) as bare:
        for streams in (1, SLOTS):
            _ask(platform, reference, streams)
            bare(streams)
            pairs = [(_ask(platform, reference, streams), bare(streams)["tokens_per_second"]) for _ in range(rounds)]
            name = f"{streams} stream{'s' * (streams > 1)} through the gateway"
            found.append(figure_of_pairs(GROUP, name, "tokens/s", "xllamacpp alone", pairs))
        alone = bare(1)["pss_mb"]
    (gateway,), (engine,) = platform.processes(GATEWAY), platform.processes(ENGINE)
    found.append(figure_of_pairs(GROUP, "memory of the engine (PSS)", "MB", "xllamacpp alone", [(_pss(engine), alone)]))
    heavy = sorted({library for library in ("torch", "llama", "mlflow") if _has_loaded(gateway, library)})
    note = f"of the libraries torch, llama and mlflow it has loaded: {', '.join(heavy) or 'none'}"
    found.append(Figure(GROUP, "memory of the gateway (PSS)", "MB", _pss(gateway), note, note=note))
    return found


def _ask(platform: Platform, reference: str, streams: int) -> float:
    """Tokens per second of so many streamed answers at once."""
    requests = [{**request, "model": reference} for request in _requests(streams)]

    def answer(request: dict[str, Any]) -> int:
        used = 0
        with client.stream("POST", "/v1/chat/completions", json=request) as response:
            assert response.is_success, response.read()
            for line in response.iter_lines():
                if '"completion_tokens"' in line:
                    used = json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"]
        return used

    with httpx.Client(base_url=platform.url, timeout=120) as client, ThreadPoolExecutor(streams) as threads:
        started = time.perf_counter()
        said = sum(threads.map(answer, requests))
        return said / (time.perf_counter() - started)


def _requests(streams: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [{"role": "user", "content": f"Tell me about episode {number}."}],
            "max_tokens": TOKENS,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for number in range(streams)
    ]


@contextmanager
def _bare_engine(file: Path) -> Generator[Any]:
    """A process with that model: asked for a number of streams, it tells how fast they were."""
    wanted = {"model": str(file), "context": CONTEXT, "slots": SLOTS, "port": unused_ports(1)[0]}
    script = str(Path(__file__).parent / "bare_engine.py")
    command = [sys.executable, script, json.dumps(wanted)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    requests, answers = process.stdin, process.stdout
    assert answers.readline().strip() == "ready"

    def ask(streams: int) -> dict[str, float]:
        print(json.dumps(_requests(streams)), file=requests, flush=True)
        return json.loads(answers.readline())

    try:
        yield ask
    finally:
        process.kill()
        process.wait()
        requests.close()
        answers.close()


def _pss(process: psutil.Process) -> float:
    return process.memory_full_info().pss / 2**20


def _has_loaded(process: psutil.Process, library: str) -> bool:
    """Whether files of such a Python package, or of a native library of that name, are mapped into the process."""
    return any(f"/{library}" in place.path or f"/lib{library}" in place.path for place in process.memory_maps())
