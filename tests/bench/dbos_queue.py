"""The same no-op on DBOS over SQLite: `python -m tests.bench.dbos_queue throughput|latency COUNT [stock]`.

Tuned as far as its options go: SQLite in WAL mode without a sync per commit, as ours; all workflows enqueued in one
transaction; a poll every 10 ms. `stock` leaves it as it comes.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import sqlalchemy
import sqlalchemy.event
from dbos import DBOS, DBOSClient

QUEUE = "bench"
POLL_SECONDS = 0.01
WORKERS = 16


@DBOS.workflow(name="noop")
def noop() -> float:
    return time.time()


def main(figure: str, count: int, stock: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="forgearr-bench-") as folder:
        url = f"sqlite:///{Path(folder) / 'dbos.db'}"
        engine = None if stock else _fast_engine(url)
        DBOS(
            config={
                "name": "bench",
                "system_database_url": url,
                "system_database_engine": engine,
                "log_level": "WARNING",
                "max_executor_threads": WORKERS,
            }
        )
        DBOS.launch()
        options: dict[str, Any] = {} if stock else {"polling_interval_sec": POLL_SECONDS}
        DBOS.register_queue(QUEUE, **options)
        client = DBOSClient(system_database_url=url, system_database_engine=engine)
        reading = sqlalchemy.create_engine(url)
        _wait_until_succeeded(reading, _enqueue(client, 1, reading, batch=not stock))
        measured = {"throughput": _throughput, "latency": _latency}[figure](client, reading, count, stock)
        DBOS.destroy()
        return measured


def _throughput(client: DBOSClient, reading: sqlalchemy.Engine, count: int, stock: bool) -> dict[str, Any]:
    started = time.time()
    ids = _enqueue(client, count, reading, batch=not stock)
    enqueued = time.time() - started
    _wait_until_succeeded(reading, ids)
    return {"jobs_per_second": count / (time.time() - started), "enqueue_seconds": enqueued}


def _latency(client: DBOSClient, reading: sqlalchemy.Engine, count: int, stock: bool) -> dict[str, Any]:
    milliseconds: list[float] = []
    for _ in range(count):
        started = time.time()
        ids = _enqueue(client, 1, reading, batch=False)
        _wait_until_succeeded(reading, ids)
        began: float = DBOS.retrieve_workflow(ids[0]).get_result()
        milliseconds.append((began - started) * 1000)
    return {"milliseconds": milliseconds}


def _enqueue(client: DBOSClient, count: int, engine: sqlalchemy.Engine, *, batch: bool) -> list[str]:
    options: Any = {"workflow_name": "noop", "queue_name": QUEUE}
    if not batch:
        return [client.enqueue(options).workflow_id for _ in range(count)]
    with engine.begin() as connection:
        return [client.enqueue_in_transaction(connection, options).workflow_id for _ in range(count)]


def _wait_until_succeeded(reading: sqlalchemy.Engine, ids: list[str]) -> None:
    open_ones = sqlalchemy.text("SELECT count(*) FROM workflow_status WHERE status != 'SUCCESS'")
    while True:
        with reading.connect() as connection:
            if connection.scalar(open_ones) == 0:
                return
        time.sleep(0.005 if len(ids) == 1 else 0.05)


def _fast_engine(url: str) -> sqlalchemy.Engine:
    engine = sqlalchemy.create_engine(url)

    @sqlalchemy.event.listens_for(engine, "connect")
    def set_pragmas(connection: Any, _: object) -> None:  # pyright: ignore[reportUnusedFunction]
        connection.isolation_level = "IMMEDIATE"
        for pragma in (
            "journal_mode = WAL",
            "synchronous = NORMAL",
            "busy_timeout = 30000",
            "foreign_keys = ON",
        ):
            connection.execute(f"PRAGMA {pragma}")

    return engine


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), stock="stock" in sys.argv)))
