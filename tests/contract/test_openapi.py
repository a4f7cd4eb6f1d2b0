"""The OpenAPI document is correct: schemathesis sends valid and invalid requests, and checks every response.

The quick test tries a few examples of each operation. The others try many: one server gets all boundary values, the
other random ones. Both kinds on both servers would take twice as long and find the same.
"""

import asyncio
import os
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from secrets import token_hex

import pytest
from sqlalchemy import update

from cluster import identity
from cluster.db import Database, now
from cluster.ownership import LOCAL
from cluster.settings import get_settings
from jobs import journal, queue
from jobs.journal import JournalEntry
from jobs.states import State
from jobs.tables import Job
from pipelines.training.data import prompts
from pipelines.training.sessions import TrainingSession
from serve.app import create_app
from tests.support.app_server import running_app
from tests.support.registry_model import RegistryModel
from tests.support.waiting import TIMEOUT

CONFIGURATION = Path(__file__).parent / "schemathesis.toml"


@pytest.fixture
async def stocked(database: Database, registry_model: RegistryModel) -> Database:
    """A database with finished jobs and their journals, a training session, and a registry with a model."""
    await registry_model.register()
    async with database.transaction() as session:
        job = await queue.enqueue(session, queue.JobRequest(kind="probe", spec={"payload": "✓"}), LOCAL)
        log = {"level": "INFO", "message": "one step"}
        prompt = {"name": "Lights", "user_input": "Are the lights on?", "expected_output": "Yes.", "tags": ["home"]}
        await prompts.create(session, prompts.PromptRequest.model_validate(prompt), LOCAL)
        entries = [
            JournalEntry(job.id, "running", {"worker": "w"}),
            JournalEntry(job.id, "log", log),
            JournalEntry(job.id, "succeeded"),
        ]
        journal.record(session, entries)
        values = {"started_at": now(), "finished_at": now(), "phase": "step 1 of 1", "progress": 100.0}
        finished = update(Job).where(Job.id == job.id).values(state=State.SUCCEEDED, result={"payload": "✓"}, **values)
        await session.execute(finished)
        spec = {"data": {"dataset": "demo/homelab"}}
        training = await queue.enqueue(session, queue.JobRequest(kind="fine_tune", spec=spec), LOCAL)
        metrics = {"step": 3, "epoch": 0.5, "loss": 2.5, "learning_rate": 2e-4, "memory_mb": 512.0}
        journal.record(session, [JournalEntry(training.id, "progress", {"metrics": metrics})])
        columns = {
            "name": "House v1",
            "base_model": "forgearr/tiny",
            "config": {"num_epochs": 2},
            "created_by": "local",
        }
        session.add_all([TrainingSession(**columns), TrainingSession(**columns, job_id=training.id)])
    return database


@pytest.mark.usefixtures("stocked")
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_a_few_examples_of_every_operation(configure: Callable[..., None], tmp_path: Path) -> None:
    """Streams are not followed: each would take a second. So few examples of an operation may all get 401."""
    configure(limits__enabled="false")
    text = CONFIGURATION.read_text()
    for many, few in (
        ('"missing_auth", ', ""),
        ("\nmax-examples = 25\n", "\nmax-examples = 3\n"),
        ("\ngeneration.max-examples = 8\n", '\nparameters = { "query.follow" = false }\n'),
    ):
        assert text.count(many) == 1
        text = text.replace(many, few)
    (tmp_path / "few.toml").write_text(text)
    async with running_document() as url:
        await check(url, "--phases", "examples,fuzzing", configuration=tmp_path / "few.toml")


@pytest.mark.deep
@pytest.mark.usefixtures("stocked")
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_a_server_that_requires_no_credential(configure: Callable[..., None]) -> None:
    configure(limits__enabled="false")
    async with running_document() as url:
        await check(url, "--phases", "examples,fuzzing,stateful")


@pytest.mark.deep
@pytest.mark.parametrize("database", ["postgres"], indirect=True)
async def test_a_server_that_requires_a_credential(stocked: Database, configure: Callable[..., None]) -> None:
    configure(auth__required="true", limits__enabled="false")
    # Responses contain the email, and schemathesis tries to log in with it.
    password_hash = await identity.hash_password(token_hex(16))
    async with stocked.transaction() as session:
        admin = await identity.add_user(
            session, email="admin@example.com", username="admin", password_hash=password_hash, role="admin"
        )
    # Not an API key: schemathesis would find and revoke it.
    token = identity.create_access_token(admin)
    async with running_document() as url:
        await check(url, "--phases", "coverage", "--header", f"Authorization: Bearer {token}")


@pytest.fixture
def configure(database: Database, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Change settings: `configure(auth__required="true")`."""

    def change(**settings: str) -> None:
        for name, value in settings.items():
            monkeypatch.setenv(f"FORGEARR_{name.upper()}", value)
        get_settings.cache_clear()

    return change


@asynccontextmanager
async def running_document() -> AsyncGenerator[str]:
    """Run a server; yields the URL of its document, which is made before: schemathesis waits ten seconds for it."""
    app = create_app()
    app.openapi()
    async with running_app(app) as address:
        yield f"http://{address}/api/v1/openapi.json"


async def check(url: str, *options: str, configuration: Path = CONFIGURATION) -> None:
    """Run schemathesis over the whole document. Its output has a command that reproduces each failure."""
    program = Path(sys.executable).parent / "schemathesis"
    command = [program, "--config-file", configuration, "run", url, "--no-color", *options]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env=dict(os.environ)
    )
    async with asyncio.timeout(2 * TIMEOUT):
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
