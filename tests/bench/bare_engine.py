"""xllamacpp by itself, asked for several answers at once, or one by one. `python bare_engine.py JSON`: prints JSON.

It stays for as many rounds as lines come in: each is how many at once, and what is asked.
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import psutil


def main(model: str, context: int, slots: int, port: int) -> None:
    xllamacpp: Any = import_module("xllamacpp")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.n_parallel = slots
    parameters.n_ctx = context * slots
    parameters.cache_ram_mib = 0
    parameters.port = port
    parameters.verbosity = 1
    server = xllamacpp.Server(parameters)

    def answer(request: dict[str, Any]) -> tuple[int, float]:
        used: list[int] = []
        heard_at: list[float] = []
        asked_at = time.perf_counter()

        def hear(chunk: bytes) -> bool:
            heard_at.append(time.perf_counter())
            told = json.loads(chunk)
            if "usage" in told:
                used.append(told["usage"]["completion_tokens"])
            return False

        server.handle_chat_completions(json.dumps(request), hear)
        return used[-1], (heard_at[0] - asked_at) * 1000

    print("ready", flush=True)
    for line in sys.stdin:
        at_once, requests = json.loads(line)
        started = time.perf_counter()
        with ThreadPoolExecutor(at_once) as threads:
            answers = list(threads.map(answer, requests))
        seconds = time.perf_counter() - started
        told = {
            "tokens_per_second": sum(tokens for tokens, _ in answers) / seconds,
            "first_ms": [first for _, first in answers],
            "pss_mb": psutil.Process().memory_full_info().pss / 2**20,
        }
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
