"""A server that needs credentials, and people with accounts on it. The jobs stay where a test puts them."""

from collections import Counter
from typing import Any

import httpx
from fastapi import FastAPI
from sqlalchemy import func, select, update

from cluster import identity, ownership
from cluster.db import Database
from jobs import journal, queue
from jobs.journal import JournalEntry
from jobs.states import State
from jobs.tables import Job

SESSIONS = "/api/training/sessions"
SESSION = {"name": "House v1", "config": {"num_epochs": 4, "batch_size": 2}}
LEARN = {"data": {"dataset": "demo/homelab"}}


class House:
    """A server, and people with accounts on it."""

    def __init__(self, app: FastAPI, database: Database, people: dict[str, identity.User]) -> None:
        self.app = app
        self.database = database
        self.people = people
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(app, client=("192.0.2.1", 40000)), base_url="https://api.example", timeout=60
        )

    async def ask(self, who: str, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {
            "Authorization": f"Bearer {identity.create_access_token(self.people[who])}",
            **options.pop("headers", {}),
        }
        if method in {"POST", "PUT"}:
            headers["Content-Type"] = "application/json"
        return await self.http.request(method, path, headers=headers, **options)

    async def session(self, who: str = "ada", **said: Any) -> str:
        answer = await self.ask(who, "POST", SESSIONS, json={**SESSION, **said})
        assert answer.status_code == 201, answer.text
        return answer.json()["id"]

    async def start(self, session: str, who: str = "ada", **said: Any) -> httpx.Response:
        return await self.ask(who, "POST", f"{SESSIONS}/{session}/start", json=said or LEARN)

    async def prompt(self, who: str = "ada") -> int:
        told = {"name": "Lights", "user_input": "Are the lights on?", "expected_output": "Yes."}
        return (await self.ask(who, "POST", "/api/training/prompts", json=told)).json()["id"]

    async def queue(self, kind: str, spec: dict[str, Any], who: str = "ada", **facts: Any) -> str:
        """A job that is as it is said to be."""
        user = self.people[who]
        principal = ownership.Principal(id=user.id, name=who, is_admin=user.role == "admin")
        async with self.database.transaction() as session:
            job = await queue.enqueue(session, queue.JobRequest(kind=kind, spec=spec), principal)
        await self.settle(job.id, **facts)
        return job.id

    async def training(self, who: str = "ada", **facts: Any) -> str:
        return await self.queue("fine_tune", LEARN, who, **{"state": State.SUCCEEDED, "result": {}} | facts)

    async def settle(self, job_id: str, **facts: Any) -> None:
        if facts:
            async with self.database.transaction() as session:
                await session.execute(update(Job).where(Job.id == job_id).values(**facts))

    async def tell(self, job_id: str, **metrics: Any) -> None:
        async with self.database.transaction() as session:
            journal.record(session, [JournalEntry(job_id, "progress", {"metrics": metrics})])

    async def kinds(self) -> Counter[str]:
        """How many jobs of each kind there are."""
        async with self.database.read_transaction() as session:
            rows = await session.execute(select(Job.kind, func.count().label("count")).group_by(Job.kind))
            return Counter({row.kind: row.count for row in rows})

    async def job(self, job_id: str) -> dict[str, Any]:
        return (await self.ask("admin", "GET", f"/api/v1/jobs/{job_id}")).json()
