"""Deletions wait while they are held, for a moment only."""

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from cluster import storage
from cluster.mlflow_client import MlflowRestClient
from cluster.storage import HeldTooLong
from tests.support.waiting import TIMEOUT, eventually

HOLD = """
import sys, time
from pathlib import Path
from cluster import storage

with storage.deletions_held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def address(home: Path, tmp_path: Path) -> str:
    (tmp_path / "file").write_text("content")
    return storage.save(tmp_path / "file", "files/one")


def test_a_deletion_waits_while_they_are_held(home: Path, address: str) -> None:
    with storage.deletions_held(home / "storage"):
        deleting = threading.Thread(target=storage.remove, args=[address])
        deleting.start()
        deleting.join(0.3)
        assert deleting.is_alive()
        assert storage.exists(address)
    deleting.join(TIMEOUT)
    assert not storage.exists(address)


def test_they_are_held_when_those_that_began_have_finished(home: Path, address: str) -> None:
    is_held = threading.Event()

    def hold() -> None:
        with storage.deletions_held(home / "storage"):
            is_held.set()

    with storage.deletion():
        holding = threading.Thread(target=hold)
        holding.start()
        assert not is_held.wait(0.3)
    assert is_held.wait(TIMEOUT)
    holding.join(TIMEOUT)


def test_who_holds_them_and_is_killed_stops_nobody(home: Path, address: str) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(home / "storage")], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    deleting = threading.Thread(target=storage.remove, args=[address])
    deleting.start()
    assert storage.exists(address)
    holder.kill()
    holder.wait(TIMEOUT)
    holder.stdout.close()
    deleting.join(TIMEOUT)
    assert not storage.exists(address)


def test_who_is_frozen_while_it_holds_them_is_not_waited_for(
    home: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "MAX_WAIT_SECONDS", 0.1)
    with pytest.raises(HeldTooLong, match="took"), storage.deletions_held(home / "storage", 0.1):
        storage.remove(address)
    assert not storage.exists(address)


async def test_artifacts_of_mlflow_are_not_deleted_while_they_are_held(home: Path) -> None:
    requests: list[str] = []

    def respond(request: httpx.Request) -> httpx.Response:
        requests.append(request.method)
        return httpx.Response(200, json={})

    async with httpx.AsyncClient(transport=httpx.MockTransport(respond), base_url="http://mlflow.example") as client:
        with storage.deletions_held(home / "storage"):
            deleting = asyncio.create_task(MlflowRestClient(client).delete_artifacts("mlflow-artifacts:/1/model"))
            await asyncio.wait({deleting}, timeout=0.3)
            assert requests == []
        await deleting
    assert requests == ["DELETE"]


def test_many_delete_at_the_same_time(home: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    addresses = [storage.save(tmp_path / "file", f"files/{number}") for number in range(8)]
    with storage.deletion():
        deleting = [threading.Thread(target=storage.remove, args=[address]) for address in addresses]
        for thread in deleting:
            thread.start()
        eventually(lambda: not any(storage.exists(address) for address in addresses))
    for thread in deleting:
        thread.join(TIMEOUT)
