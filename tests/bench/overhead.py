"""What a gateway costs in front of an engine: ours, next to LiteLLM's proxy in front of llama.cpp's own HTTP server.

The model is forgearr/tiny and an answer has one word, so that next to nothing of the time is the engine's. What each
adds is beside llama.cpp's server asked directly.
"""

import json
import sys
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import httpx

from tests.bench.figures import Figure, figure_of_pairs
from tests.bench.servers import run, running_server
from tests.bench.wrk import requests_per_second
from tests.support.platform import Platform, unused_ports
from tests.support.waiting import TIMEOUT

GROUP = "A gateway in front of an engine, forgearr/tiny, answers of one word"
PEER, PACKAGE = "LiteLLM's proxy", "litellm[proxy]==1.106.2"
MODEL = "forgearr/tiny"
QUESTION = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1, "temperature": 0}
CONNECTIONS = 8
SECONDS = 8
QUESTIONS = 200
OPEN_AND_OFFLINE = {
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}
"""On loopback ours asks for no key either."""


def figures(platform: Platform, rounds: int = 3) -> list[Figure]:
    ours = f"{platform.url}/v1"
    _one_by_one(ours, 1)  # makes the model's file, and loads it
    (file,) = (platform.home / "cache").glob("*tiny*.gguf")
    with ExitStack() as stack:
        alone = stack.enter_context(_llama_server(file, platform.home))
        peer = stack.enter_context(_proxy(alone, platform.home))
        for url in (ours, alone, peer):
            _one_by_one(url, QUESTIONS)
        rates = [(_at_once(ours), _at_once(peer)) for _ in range(rounds)]
        times = [{url: _one_by_one(url, QUESTIONS) for url in (ours, alone, peer)} for _ in range(rounds)]
    added = [(time[ours] - time[alone], time[peer] - time[alone]) for time in times]
    note = f"llama.cpp's own server answers in {median(time[alone] for time in times):.1f} ms"
    return [
        figure_of_pairs(GROUP, f"answers at {CONNECTIONS} connections", "requests/s", PEER, rates),
        figure_of_pairs(GROUP, "added to one answer, p50", "ms", PEER, added, note),
    ]


def _at_once(url: str) -> float:
    script = Path(__file__).parent / "post_chat.lua"
    return requests_per_second(f"{url}/chat/completions", CONNECTIONS, SECONDS, script)


def _one_by_one(url: str, count: int) -> float:
    """Milliseconds from a question to its answer, the median of so many."""
    taken: list[float] = []
    with httpx.Client(timeout=TIMEOUT) as client:
        for _ in range(count):
            started = time.perf_counter()
            client.post(f"{url}/chat/completions", json=QUESTION).raise_for_status()
            taken.append((time.perf_counter() - started) * 1000)
    return median(taken)


@contextmanager
def _llama_server(file: Path, home: Path) -> Generator[str]:
    """xllamacpp's engine, asked through the HTTP server that is a part of it, set as ours is."""
    port = unused_ports(1)[0]
    wanted = {"model": str(file), "context": 512, "slots": CONNECTIONS, "port": port}
    script = str(Path(__file__).parent / "bare_engine.py")
    url = f"http://127.0.0.1:{port}/v1"
    with running_server([sys.executable, script, json.dumps(wanted)], f"{url}/models", home / "llama-server.log"):
        yield url


@contextmanager
def _proxy(engine: str, home: Path) -> Generator[str]:
    """LiteLLM, in an environment of its own: it wants other versions of much that is here."""
    folder, port = home / "litellm", unused_ports(1)[0]
    run([sys.executable, "-m", "venv", folder])
    run([folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check", PACKAGE])
    config = home / "litellm.json"
    model = {"model": f"openai/{MODEL}", "api_base": engine, "api_key": "none"}
    config.write_text(json.dumps({"model_list": [{"model_name": MODEL, "litellm_params": model}]}))
    command = [folder / "bin" / "litellm", "--config", config, "--host", "127.0.0.1", "--port", str(port)]
    url = f"http://127.0.0.1:{port}/v1"
    with running_server(command, f"{url}/models", home / "litellm.log", OPEN_AND_OFFLINE):
        yield url
