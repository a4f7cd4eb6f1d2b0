"""A client of an application that requires credentials. No worker runs, so jobs stay as a test queues them."""

from collections import Counter
from typing import Any

import httpx
from fastapi import FastAPI
from sqlalchemy import func, select, update

from cluster import identity
from cluster.db import Database
from jobs import journal, queue
from jobs.journal import JournalEntry
from jobs.states import State
from jobs.tables import Job

SESSIONS = "/api/training/sessions"
SESSION = {"name": "House v1", "config": {"num_epochs": 4, "batch_size": 2}}
LEARN = {"data": {"dataset": "demo/homelab"}}


async def add_users(database: Database) -> dict[str, identity.User]:
    """Two users, and an administrator."""
    users: dict[str, identity.User] = {}
    async with database.transaction() as session:
        for name in ("ada", "bob", "admin"):
            role = "admin" if name == "admin" else "user"
            users[name] = await identity.add_user(
                session, email=f"{name}@example.com", username=name, password_hash="-", role=role
            )
    return users


class ApiClient:
    """The application, and users with accounts on it. Each method sends a request as one of them."""

    def __init__(self, app: FastAPI, database: Database, users: dict[str, identity.User]) -> None:
        self.app = app
        self.database = database
        self.users = users
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(app, client=("192.0.2.1", 40000)), base_url="https://api.example", timeout=60
        )

    def authorization(self, username: str) -> str:
        return f"Bearer {identity.create_access_token(self.users[username])}"

    async def request(self, username: str, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {"Authorization": self.authorization(username), **options.pop("headers", {})}
        if method in {"POST", "PUT"}:
            headers["Content-Type"] = "application/json"
        return await self.http.request(method, path, headers=headers, **options)

    async def set_password(self, username: str, password: str) -> None:
        """Give a user a password to log in with. Until then they have none."""
        async with self.database.transaction() as session:
            user = await identity.get_user(session, f"{username}@example.com")
            user.password_hash = await identity.hash_password(password)

    async def create_session(self, username: str = "ada", **fields: Any) -> str:
        response = await self.request(username, "POST", SESSIONS, json={**SESSION, **fields})
        assert response.status_code == 201, response.text
        return response.json()["id"]

    async def start_session(self, session: str, username: str = "ada", **fields: Any) -> httpx.Response:
        return await self.request(username, "POST", f"{SESSIONS}/{session}/start", json=fields or LEARN)

    async def create_prompt(self, username: str = "ada") -> int:
        prompt = {"name": "Lights", "user_input": "Are the lights on?", "expected_output": "Yes."}
        return (await self.request(username, "POST", "/api/training/prompts", json=prompt)).json()["id"]

    async def queue_job(self, kind: str, spec: dict[str, Any], username: str = "ada", **values: Any) -> str:
        """Queue a job and give its row these values."""
        principal = identity.principal(self.users[username])
        async with self.database.transaction() as session:
            job = await queue.enqueue(session, queue.JobRequest(kind=kind, spec=spec), principal)
        await self.update_job(job.id, **values)
        return job.id

    async def queue_training(self, username: str = "ada", **values: Any) -> str:
        return await self.queue_job("fine_tune", LEARN, username, **{"state": State.SUCCEEDED, "result": {}} | values)

    async def queue_forge(self, **values: Any) -> str:
        return await self.queue_job("forge", {**LEARN, "deploy": False}, **{"state": State.RUNNING} | values)

    async def queue_child(self, parent: str, kind: str, spec: dict[str, Any], **values: Any) -> str:
        return await self.queue_job(kind, spec, **{"parent_id": parent, "child_name": kind} | values)

    async def update_job(self, job_id: str, **values: Any) -> None:
        if values:
            async with self.database.transaction() as session:
                await session.execute(update(Job).where(Job.id == job_id).values(**values))

    async def report_metrics(self, job_id: str, **metrics: Any) -> None:
        async with self.database.transaction() as session:
            journal.record(session, [JournalEntry(job_id, "progress", {"metrics": metrics})])

    async def count_kinds(self) -> Counter[str]:
        """How many jobs of each kind there are."""
        async with self.database.read_transaction() as session:
            rows = await session.execute(select(Job.kind, func.count().label("count")).group_by(Job.kind))
            return Counter({row.kind: row.count for row in rows})

    async def get_job(self, job_id: str) -> dict[str, Any]:
        return (await self.request("admin", "GET", f"/api/v1/jobs/{job_id}")).json()
