"""Webhooks: signed pushes as GitHub, Gitea and GitLab send them, and other requests."""

import hashlib
import hmac
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
from sqlalchemy import select, update

from cluster.db import Database
from jobs.states import State
from jobs.tables import Job
from pipelines.guardian.watch_repo import WATCH_REPO_KIND
from pipelines.guardian.webhooks import repository_key
from serve.app import create_app

SECRET = "a secret of webhooks"
URL = "https://git.example.com/Ada/work"
BEFORE, AFTER = "a" * 40, "b" * 40


@pytest.fixture
async def client(database: Database) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(), client=("127.0.0.1", 40000))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", timeout=60) as client:
        repository = {"name": "work", "url": URL, "webhook_secret": SECRET}
        assert (await client.post("/api/v1/repos", json=repository)).status_code == 201
        await end_all(database)
        yield client


async def end_all(database: Database) -> None:
    async with database.transaction() as session:
        await session.execute(update(Job).values(state=State.SUCCEEDED))


async def count_checks(database: Database) -> int:
    """The number of checks that were queued since the repository was registered."""
    async with database.read_transaction() as session:
        return len(list(await session.scalars(select(Job.id).where(Job.kind == WATCH_REPO_KIND)))) - 1


def push(provider: str, **changes: Any) -> dict[str, Any]:
    """The body of a push, with the fields that matter."""
    fields = {"ref": "refs/heads/main", "before": BEFORE, "after": AFTER}
    if provider == "gitlab":
        project = {"web_url": URL, "git_http_url": f"{URL}.git", "git_ssh_url": "git@git.example.com:Ada/work.git"}
        return {**fields, "object_kind": "push", "project": {**project, "default_branch": "main"}, **changes}
    repository = {"clone_url": f"{URL}.git", "ssh_url": "git@git.example.com:Ada/work.git", "html_url": URL}
    return {**fields, "repository": {**repository, "default_branch": "main"}, **changes}


def signed(provider: str, body: bytes, secret: str = SECRET, event: str | None = None) -> dict[str, str]:
    signature = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    headers = {
        "github": {"X-GitHub-Event": event or "push", "X-Hub-Signature-256": f"sha256={signature}"},
        "gitea": {"X-Gitea-Event": event or "push", "X-Gitea-Signature": signature},
        "gitlab": {"X-Gitlab-Event": event or "Push Hook", "X-Gitlab-Token": secret},
    }[provider]
    return {"Content-Type": "application/json", **headers}


async def send(
    client: httpx.AsyncClient, provider: str, payload: dict[str, Any], query: str = "", **signing: Any
) -> httpx.Response:
    body = json.dumps(payload).encode()
    return await client.post(f"/webhooks/{provider}{query}", content=body, headers=signed(provider, body, **signing))


@pytest.mark.parametrize("provider", ["github", "gitea", "gitlab"])
async def test_a_repeated_push_makes_one_job(client: httpx.AsyncClient, database: Database, provider: str) -> None:
    first = await send(client, provider, push(provider))
    assert (first.status_code, first.json()["status"]) == (202, "queued"), first.text
    again = await send(client, provider, push(provider))
    assert again.json() == first.json()
    await end_all(database)
    replayed = await send(client, provider, push(provider))
    assert replayed.json() == first.json(), "also when the check has finished"
    assert await count_checks(database) == 1
    other = await send(client, provider, push(provider, after="c" * 40))
    assert other.json()["job_ids"] != first.json()["job_ids"]
    assert await count_checks(database) == 2


@pytest.mark.parametrize("provider", ["github", "gitea", "gitlab"])
async def test_unauthenticated_pushes_are_refused_alike(
    client: httpx.AsyncClient, database: Database, provider: str
) -> None:
    await client.post("/api/v1/repos", json={"name": "silent", "url": "https://git.example.com/ada/silent"})
    await end_all(database)
    other = {"clone_url": "https://git.example.com/ada/other.git", "git_http_url": "https://git.example.com/ada/o.git"}
    body = json.dumps(push(provider)).encode()
    refused = [
        await send(client, provider, push(provider), secret="another secret entirely"),
        await send(client, provider, push(provider, repository=other, project=other)),
        await send(client, provider, push(provider), query="?repository=unknown"),
        await send(client, provider, push(provider), query="?repository=silent", secret=""),
        await client.post(f"/webhooks/{provider}", content=body, headers={"Content-Type": "application/json"}),
        await client.post(f"/webhooks/{provider}", content=b"[]", headers=signed(provider, b"[]")),
        await client.post(
            f"/webhooks/{provider}", content=body + b" ", headers={**signed(provider, body), "X-Gitlab-Token": "no"}
        ),
    ]
    bodies = [{**response.json(), "timestamp": None} for response in refused]
    assert {response.status_code for response in refused} == {401}
    assert all(body == bodies[0] for body in bodies)
    assert await count_checks(database) == 1, "the one check is that of the registration of the other repository"


@pytest.mark.parametrize(
    ("payload", "event", "status", "reason"),
    [
        ({"ref": "refs/heads/other"}, None, "ignored", "This branch is not watched."),
        ({"ref": "refs/tags/v1"}, None, "ignored", "This branch is not watched."),
        ({"after": "0" * 40}, None, "ignored", "This branch is not watched."),
        ({}, "issues", "ignored", "The event is not a push."),
        ({}, "ping", "pong", None),
    ],
)
async def test_other_events_are_accepted_and_ignored(
    client: httpx.AsyncClient,
    database: Database,
    payload: dict[str, Any],
    event: str | None,
    status: str,
    reason: str | None,
) -> None:
    response = await send(client, "github", push("github", **payload), event=event)
    assert (response.status_code, response.json()["status"], response.json()["reason"]) == (202, status, reason)
    assert await count_checks(database) == 0


async def test_the_branch_and_the_repository_may_be_set(client: httpx.AsyncClient, database: Database) -> None:
    await client.patch("/api/v1/repos/work", json={"branch": "release"})
    assert (await send(client, "gitea", push("gitea"))).json()["status"] == "ignored"
    pushed = push("gitea", ref="refs/heads/release", repository={"clone_url": "https://mirror.example.com/x.git"})
    assert (await send(client, "gitea", pushed)).status_code == 401
    assert (await send(client, "gitea", pushed, query="?repository=work")).json()["status"] == "queued"
    await client.patch("/api/v1/repos/work", json={"enabled": False})
    later = {**pushed, "after": "d" * 40}
    assert (await send(client, "gitea", later, query="?repository=work")).json()["status"] == "ignored"


async def test_github_may_send_a_form(client: httpx.AsyncClient) -> None:
    body = urlencode({"payload": json.dumps(push("github"))}).encode()
    headers = {**signed("github", body), "Content-Type": "application/x-www-form-urlencoded"}
    response = await client.post("/webhooks/github", content=body, headers=headers)
    assert response.json()["status"] == "queued"


def test_urls_of_one_repository_have_one_key() -> None:
    urls = [
        "https://git.example.com/Ada/work",
        "https://git.example.com:8443/ada/work.git",
        "ssh://git@git.example.com:2222/Ada/work.git",
        "git@git.example.com:Ada/work.git",
        "http://ada@GIT.example.com/ada/work/",
    ]
    assert {repository_key(url) for url in urls} == {"git.example.com/ada/work"}
    assert repository_key("https://git.example.com/ada/work2") != repository_key(urls[0])
    assert repository_key("https://[broken") == ""
