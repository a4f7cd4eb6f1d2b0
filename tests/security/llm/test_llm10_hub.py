"""LLM10, unbounded consumption, and LLM02, disclosure: what somebody wants from the hub at the operator's expense."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.db import Database
from tests.support.api_client import add_users
from tests.support.services.fake_hub import FakeHub
from tests.support.services.stub_server import stub_server

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)

TOKEN = "hf_of-the-operator"
RESOLVE = "import sys; from pipelines.training.models import base_models; print(base_models.resolve(*sys.argv[1:]))"


async def resolve(
    hub: FakeHub, cache: Path, repository: str, *owner_id: str, **settings: str
) -> subprocess.CompletedProcess[str]:
    """In a process of its own, because the library reads the address of the hub when it is imported."""
    async with stub_server(hub.answer) as server:
        environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(cache), "HF_TOKEN": TOKEN, **settings}
        command = [sys.executable, "-c", RESOLVE, repository, *owner_id]
        return await asyncio.to_thread(
            subprocess.run, command, env=environment, capture_output=True, text=True, check=False
        )


@pytest.mark.parametrize(
    ("repository", "reason"),
    [("org/private", "it is private, and HF_TOKEN is not set"), ("org/gated", "is gated: accept its terms")],
)
async def test_use_the_operators_token_for_a_closed_model(
    database: Database, tmp_path: Path, repository: str, reason: str
) -> None:
    users = await add_users(database)
    hub = FakeHub(TOKEN)
    refused = await resolve(hub, tmp_path, repository, users["ada"].id)
    assert reason in refused.stderr
    assert "HF_TOKEN was not used: it is for administrators' jobs" in refused.stderr
    assert hub.downloads == []

    for_administrators = await resolve(hub, tmp_path, repository, users["admin"].id)
    assert str(tmp_path) in for_administrators.stdout, for_administrators.stderr
    from_cache = await resolve(hub, tmp_path, repository, users["ada"].id)
    assert reason in from_cache.stderr

    opened = {"FORGEARR_FORGE__HUB_TOKEN_REPOSITORIES": "[org/*]"}
    assert str(tmp_path) in (await resolve(hub, tmp_path, repository, users["ada"].id, **opened)).stdout


async def test_a_public_model_is_for_all(database: Database, tmp_path: Path) -> None:
    users = await add_users(database)
    assert str(tmp_path) in (await resolve(FakeHub(TOKEN), tmp_path, "org/public", users["ada"].id)).stdout


async def test_fill_the_disk_with_a_huge_model(database: Database, tmp_path: Path) -> None:
    hub = FakeHub(TOKEN, weight_bytes=10**15)
    refused = await resolve(hub, tmp_path, "org/public")
    assert "DiskFull: The base model 'org/public' needs 1000000.00 GB" in refused.stderr
    assert hub.downloads == []
