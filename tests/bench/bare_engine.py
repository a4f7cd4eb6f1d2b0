"""xllamacpp by itself: tokens per second of several answers at once. `python bare_engine.py JSON`: prints JSON.

It stays for as many rounds as lines come in: each is how many answers to give at once.
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

    def answer(request: dict[str, Any]) -> int:
        used: list[int] = []

        def hear(chunk: bytes) -> bool:
            told = json.loads(chunk)
            if "usage" in told:
                used.append(told["usage"]["completion_tokens"])
            return False

        server.handle_chat_completions(json.dumps(request), hear)
        return used[-1]

    print("ready", flush=True)
    for line in sys.stdin:
        requests = json.loads(line)
        started = time.perf_counter()
        with ThreadPoolExecutor(len(requests)) as threads:
            said = sum(threads.map(answer, requests))
        seconds = time.perf_counter() - started
        pss_mb = psutil.Process().memory_full_info().pss / 2**20
        print(json.dumps({"tokens_per_second": said / seconds, "pss_mb": pss_mb}), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
