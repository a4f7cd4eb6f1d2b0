"""The same no-op on procrastinate: `python -m tests.bench.procrastinate_queue throughput|latency COUNT POSTGRES_URL`.

Woken by LISTEN/NOTIFY, which is its fastest; one worker process that runs up to 64 jobs at a time, all deferred in
one batch.
"""

import asyncio
import json
import sys
import time
from typing import Any

import procrastinate

AT_ONCE = 64

began: list[float] = []
app = procrastinate.App(connector=procrastinate.PsycopgConnector())


@app.task(name="noop")
async def noop() -> None:
    began.append(time.time())


async def throughput(count: int) -> dict[str, Any]:
    await _run_one()
    started = time.perf_counter()
    await noop.batch_defer_async(*[{} for _ in range(count)])
    enqueued = time.perf_counter() - started
    await _wait_until_succeeded(pause=0.02)
    return {"jobs_per_second": count / (time.perf_counter() - started), "enqueue_seconds": enqueued}


async def latency(count: int) -> dict[str, Any]:
    await _run_one()
    return {"milliseconds": [await _run_one() for _ in range(count)]}


async def _run_one() -> float:
    started = time.time()
    await noop.defer_async()
    await _wait_until_succeeded(pause=0.005)
    return (began[-1] - started) * 1000


async def _wait_until_succeeded(pause: float) -> None:
    unfinished = "SELECT EXISTS (SELECT FROM procrastinate_jobs WHERE status IN ('todo', 'doing')) AS left_over"
    while True:
        if not (await app.connector.execute_query_one_async(unfinished))["left_over"]:
            return
        await asyncio.sleep(pause)


async def main(figure: str, count: int, url: str) -> dict[str, Any]:
    connector = procrastinate.PsycopgConnector(conninfo=url, max_size=10)
    with app.replace_connector(connector):
        async with app.open_async():
            await app.schema_manager.apply_schema_async()
            worker = asyncio.create_task(
                app.run_worker_async(concurrency=AT_ONCE, install_signal_handlers=False, shutdown_graceful_timeout=1)
            )
            measured = await {"throughput": throughput, "latency": latency}[figure](count)
            worker.cancel()
            await asyncio.gather(worker, return_exceptions=True)
    return measured


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))))
