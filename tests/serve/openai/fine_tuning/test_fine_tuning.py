"""OpenAI's fine-tuning API through the official client: the job that a request makes, and how a job is serialized."""

import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import openai
import pytest
from sqlalchemy import update

from cluster import identity, storage
from cluster.db import Database, now
from cluster.ownership import LOCAL
from cluster.settings import get_settings
from jobs import journal, queue
from jobs.journal import JournalEntry
from jobs.queue import JobRequest
from jobs.states import Control, State
from jobs.tables import Job
from pipelines.training.models.versions import ModelNotFound
from serve.app import create_app
from serve.engines.protocol import ModelFolder
from serve.models.resolver import ModelResolver
from tests.support.api_client import add_users
from tests.support.app_server import running_app

SAMPLE = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good evening."}]}
PAIR = {
    "input": {"messages": [{"role": "user", "content": "Hello"}]},
    "preferred_output": [{"role": "assistant", "content": "Good evening."}],
    "non_preferred_output": [{"role": "assistant", "content": "What?"}],
}
TINY = "forgearr/tiny"
KEY = 'ü.b "c" [d]'


class Gateway:
    """A gateway that requires credentials, with training files and jobs in any state."""

    def __init__(self, url: str, database: Database, users: dict[str, identity.User]) -> None:
        self.database = database
        self.owners = {name: identity.principal(user) for name, user in users.items()}
        self.clients = {
            name: openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=identity.create_access_token(user), max_retries=0)
            for name, user in users.items()
        }
        self.ada, self.bob, self.admin = (self.clients[name].fine_tuning.jobs for name in ("ada", "bob", "admin"))

    async def file(self, *lines: Any, purpose: Any = "fine-tune", username: str = "ada") -> str:
        content = "\n".join(json.dumps(line) for line in lines).encode()
        return (await self.clients[username].files.create(file=("a.jsonl", content), purpose=purpose)).id

    async def create(self, **options: Any) -> Any:
        create: Any = self.ada.create
        return await create(**{"model": TINY, "training_file": await self.file(SAMPLE), **options})

    async def spec(self, job_id: str) -> dict[str, Any]:
        return (await self.job(job_id)).spec

    async def job(self, job_id: str) -> Job:
        async with self.database.read_transaction() as session:
            return await queue.get(session, job_id, LOCAL)

    async def update_job(self, job_id: str, **values: Any) -> None:
        async with self.database.transaction() as session:
            await session.execute(update(Job).where(Job.id == job_id).values(**values))

    async def step(self, job_id: str, kind: str, **values: Any) -> str:
        """A step of a forge job."""
        async with self.database.transaction() as session:
            parent = await queue.get(session, job_id, LOCAL)
            spec = {"fine_tune": {"data": {"dataset": "demo/homelab"}}, "export": {"job_id": job_id}}[kind]
            child = await queue.enqueue_child(session, parent, kind, kind, spec)
        await self.update_job(child.id, **values)
        return child.id

    async def record(self, *entries: JournalEntry) -> None:
        async with self.database.transaction() as session:
            journal.record(session, entries)

    async def resolve(self, name: str, username: str = "ada") -> Any:
        return (await ModelResolver().resolve(name, self.owners[username])).source


@pytest.fixture
async def gateway(database: Database, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Gateway]:
    monkeypatch.setenv("FORGEARR_AUTH__REQUIRED", "true")
    monkeypatch.setenv("FORGEARR_LIMITS__ENABLED", "false")
    monkeypatch.setenv("FORGEARR_MLFLOW__ENABLED", "false")
    get_settings.cache_clear()
    users = await add_users(database)
    async with running_app(create_app()) as address:
        gateway = Gateway(f"http://{address}", database, users)
        yield gateway
        for client in gateway.clients.values():
            await client.close()


# Requests


@pytest.mark.both_databases
async def test_a_request_queues_a_forge_job(gateway: Gateway) -> None:
    validation = await gateway.file(SAMPLE)
    hyperparameters = {"n_epochs": 2, "batch_size": 3, "learning_rate_multiplier": 0.5}
    job = await gateway.create(
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        validation_file=validation,
        suffix="My Model!",
        seed=3,
        metadata={"a": "b"},
        integrations=[],
    )
    row = await gateway.job(job.id)
    assert (row.kind, row.owner_id, row.spec["name"], row.spec["suffix"]) == (
        "forge",
        gateway.owners["ada"].id,
        "ft-tiny-ada",
        "my-model",
    )
    expected = {"epochs": 2, "batch_size": 3, "learning_rate": 1e-4, "seed": 3, "deploy": False, "keep_epochs": 3}
    assert row.spec.items() >= expected.items()
    assert (row.spec["data"]["file"], row.spec["validation"]["file"]) == (job.training_file, validation)
    assert job.hyperparameters.to_dict() == hyperparameters
    assert (job.status, job.validation_file, job.metadata, job.seed) == ("queued", validation, {"a": "b"}, 3)
    assert job.organization_id == f"org-{gateway.owners['ada'].id}"


async def test_auto_hyperparameters_are_the_defaults(gateway: Gateway) -> None:
    auto: Any = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    job = await gateway.create(hyperparameters=auto)
    assert job.hyperparameters.to_dict() == {"batch_size": "auto", "learning_rate_multiplier": 1.0, "n_epochs": 3}
    assert await gateway.spec(job.id) == await gateway.spec((await gateway.create(training_file=job.training_file)).id)


async def test_preference_samples_are_trained_with_dpo(gateway: Gateway) -> None:
    dpo = {"hyperparameters": {"beta": 0.3, "n_epochs": 1}}
    job = await gateway.create(training_file=await gateway.file(PAIR), method={"type": "dpo", "dpo": dpo})
    assert (job.method.type, job.method.dpo.hyperparameters.beta, job.method.supervised) == ("dpo", 0.3, None)
    assert (await gateway.spec(job.id))["beta"] == 0.3


async def test_a_preset_sets_the_base_model_and_its_options(gateway: Gateway) -> None:
    job = await gateway.create(model="qwen2.5-0.5b")
    assert (job.model, (await gateway.spec(job.id))["rank"]) == ("Qwen/Qwen2.5-0.5B-Instruct", 32)


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({"method": {"type": "reinforcement"}}, 400, "reinforcement is not available"),
        ({"method": {"type": "supervised", "dpo": {}}}, 422, "does not allow dpo"),
        ({"method": {"type": "supervised"}, "hyperparameters": {"n_epochs": 1}}, 422, "set hyperparameters in method"),
        ({"method": {"type": "dpo"}}, 400, "learns from pairs"),
        ({"hyperparameters": {"n_epochs": 0}}, 422, "n_epochs"),
        ({"hyperparameters": {"batch_size": "all"}}, 422, "batch_size"),
        ({"hyperparameters": {"beta": 1}}, 422, "beta"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, 422, "integrations"),
        ({"suffix": "x" * 65}, 422, "suffix"),
        ({"metadata": {"x" * 65: "y"}}, 422, "metadata"),
        ({"metadata": {str(n): "y" for n in range(17)}}, 422, "metadata"),
        ({"seed": -1}, 422, "seed"),
        ({"extra_body": {"n_classes": 2}}, 422, "n_classes"),
        ({"training_file": "file-unknown"}, 404, "no file"),
        ({"validation_file": "file-unknown"}, 404, "no file"),
        ({"model": "nobody:v3"}, 404, "no model"),
        ({"model": "ft:forgearr/tiny:ada::20260101_000000_aaaa"}, 404, "no model"),
        ({"model": "/etc"}, 403, "administrator"),
    ],
)
async def test_invalid_requests_are_refused(
    gateway: Gateway, options: dict[str, Any], status: int, message: str
) -> None:
    with pytest.raises(openai.APIStatusError, match=message) as refused:
        await gateway.create(**options)
    assert refused.value.status_code == status
    assert [job async for job in gateway.ada.list()] == []


async def test_an_unsuitable_file_is_refused(gateway: Gateway) -> None:
    files = [
        (await gateway.file({"no": "sample"}), "used for training: The line 1 of a.jsonl is not a valid sample"),
        (await gateway.file(SAMPLE, purpose="user_data"), "purpose 'user_data'"),
        (await gateway.file(PAIR), "kind 'preference'"),
    ]
    for file_id, message in files:
        for options in ({"training_file": file_id}, {"validation_file": file_id}):
            with pytest.raises(openai.BadRequestError, match=message):
                await gateway.create(**options)
    with pytest.raises(openai.NotFoundError):
        await gateway.create(training_file=await gateway.file(SAMPLE, username="bob"))


# Jobs


@pytest.mark.both_databases
async def test_jobs_are_paginated_and_belong_to_their_owner(gateway: Gateway) -> None:
    created = [(await gateway.create(metadata={"run": str(n % 2), KEY: "x"})).id for n in range(4)]
    created.append((await gateway.create()).id)
    newest_first = created[::-1]
    assert [job.id async for job in gateway.ada.list(limit=2)] == newest_first
    page = await gateway.ada.list(limit=2, after=newest_first[2])
    assert ([job.id for job in page.data], page.has_more) == (newest_first[3:], False)
    assert [job.id async for job in gateway.ada.list(metadata={"run": "1"})] == [created[3], created[1]]
    assert [job.id async for job in gateway.ada.list(metadata={"run": "0", KEY: "x"})] == [created[2], created[0]]
    assert [job.id async for job in gateway.ada.list(metadata={"run": "0", KEY: "y"})] == []
    assert [job.id async for job in gateway.ada.list(extra_query={"metadata": "null"})] == [created[4]]
    assert [job async for job in gateway.bob.list()] == []
    assert [job.id async for job in gateway.admin.list()] == newest_first
    attempts: list[Any] = [gateway.bob.retrieve, gateway.bob.cancel, gateway.bob.pause, gateway.bob.resume]
    for attempt in (*attempts, gateway.bob.list_events, gateway.bob.checkpoints.list):
        with pytest.raises(openai.NotFoundError):
            await attempt(created[0])
    with pytest.raises(openai.NotFoundError):
        await gateway.bob.list(after=created[0])


async def test_other_jobs_are_not_fine_tuning_jobs(gateway: Gateway) -> None:
    async with gateway.database.transaction() as session:
        probe = await queue.enqueue(session, JobRequest(kind="probe"), gateway.owners["ada"])
    job = await gateway.create()
    child = await gateway.step(job.id, "fine_tune")
    for job_id in (probe.id, child):
        with pytest.raises(openai.NotFoundError):
            await gateway.ada.retrieve(job_id)
    assert [listed.id async for listed in gateway.ada.list()] == [job.id]


@pytest.mark.both_databases
async def test_the_status_of_a_job_follows_its_step(gateway: Gateway) -> None:
    job = await gateway.create()

    async def status() -> str:
        return (await gateway.ada.retrieve(job.id)).status

    training = await gateway.step(job.id, "fine_tune")
    assert await status() == "queued"
    steps: list[tuple[dict[str, Any], str]] = [
        ({"state": State.RUNNING, "phase": "gathering the data"}, "validating_files"),
        ({"state": State.RUNNING, "phase": "training"}, "running"),
        ({"state": State.PAUSED}, "paused"),
        ({"state": State.SUCCEEDED, "phase": None}, "running"),
    ]
    for values, expected in steps:
        await gateway.update_job(training, **values)
        assert await status() == expected
    for state in (State.PAUSED, State.CANCELLED, State.SUCCEEDED):
        result = {"name": "ft-tiny", "version": 1} if state == State.SUCCEEDED else None
        await gateway.update_job(job.id, state=state, result=result)
        assert await status() == state


async def test_the_finish_time_is_estimated(gateway: Gateway) -> None:
    job = await gateway.create()
    training = await gateway.step(job.id, "fine_tune", state=State.RUNNING, phase="training", started_at=now())
    assert (await gateway.ada.retrieve(job.id)).estimated_finish is None
    await gateway.record(
        JournalEntry(training, "progress", {"metrics": {"step": 1, "loss": 2.0, "eta_seconds": 600.0}})
    )
    estimated = (await gateway.ada.retrieve(job.id)).estimated_finish
    assert estimated
    assert 590 < estimated - now().timestamp() < 1200


async def test_the_error_of_a_job_is_that_of_its_step(gateway: Gateway) -> None:
    job = await gateway.create()
    error = {"code": "sample_too_long", "message": "Sample 3 has 5000 tokens."}
    await gateway.step(job.id, "fine_tune", state=State.FAILED, error=error)
    parent_error = {"code": "child_failed", "message": "Its child 'fine_tune' failed."}
    await gateway.update_job(job.id, state=State.FAILED, error=parent_error, finished_at=now())
    failed = await gateway.ada.retrieve(job.id)
    assert (failed.status, failed.fine_tuned_model) == ("failed", None)
    assert failed.error
    assert failed.error.to_dict() == {**error, "param": "training_file"}
    with pytest.raises(openai.ConflictError):
        await gateway.ada.pause(job.id)


async def test_a_job_is_paused_and_resumed_with_its_step(gateway: Gateway) -> None:
    job = await gateway.create()
    assert (await gateway.ada.pause(job.id)).status == "paused"
    assert (await gateway.ada.resume(job.id)).status == "queued"
    training = await gateway.step(job.id, "fine_tune", state=State.RUNNING, worker="w", lease_token="t")
    assert (await gateway.ada.pause(job.id)).status == "paused"
    assert ((await gateway.job(job.id)).state, (await gateway.job(training)).control) == (State.PAUSED, Control.PAUSE)
    assert (await gateway.ada.resume(job.id)).status == "running"
    assert ((await gateway.job(job.id)).state, (await gateway.job(training)).control) == (State.QUEUED, None)
    with pytest.raises(openai.ConflictError, match="not paused"):
        await gateway.ada.resume(job.id)
    await gateway.ada.cancel(job.id)
    assert (await gateway.job(training)).control == Control.CANCEL


async def test_the_journal_is_serialized_as_openai_events(gateway: Gateway) -> None:
    job = await gateway.create()
    training = await gateway.step(job.id, "fine_tune")
    metrics = {"step": 2, "epoch": 1.0, "loss": 1.5, "token_accuracy": 0.5, "memory_mb": 100.0}
    await gateway.record(
        JournalEntry(job.id, "running"),
        JournalEntry(job.id, "queued", {"parked": True}),
        JournalEntry(training, "running", {"worker": "w"}),
        JournalEntry(training, "progress", {"phase": "loading the model"}),
        JournalEntry(training, "progress", {"metrics": metrics}),
        JournalEntry(training, "progress", {"metrics": {"step": 2, "eval_loss": 1.25}}),
        JournalEntry(training, "log", {"level": "WARNING", "message": "Out of memory at step 2."}),
        JournalEntry(training, "succeeded"),
        JournalEntry(job.id, "failed", {"error": {"code": "x", "message": "No room."}}),
    )
    listed = [event async for event in gateway.ada.list_events(job.id, limit=2)][::-1]
    assert [(event.level, event.type, event.message) for event in listed] == [
        ("info", "message", f"Created fine-tuning job: {job.id}"),
        ("info", "message", "Fine-tuning job started"),
        ("info", "metrics", "Step 2: training loss=1.5000"),
        ("info", "metrics", "Step 2: validation loss=1.2500"),
        ("warn", "message", "Out of memory at step 2."),
        ("error", "message", "The job failed: No room."),
    ]
    assert listed[2].data == {"step": 2, "train_loss": 1.5, "train_mean_token_accuracy": 0.5}
    with pytest.raises(openai.BadRequestError, match="no event"):
        await gateway.ada.list_events(job.id, after="ftevent-x")


async def test_checkpoint_names_resolve_to_their_folders(gateway: Gateway) -> None:
    job = await gateway.create(suffix="demo")
    moment = now() - timedelta(minutes=1)
    epochs: list[dict[str, Any]] = [
        {
            "address": storage.address(f"jobs/x/epochs/{step}"),
            "created_at": moment.isoformat(),
            "step": step,
            "loss": 2.0,
        }
        for step in (4, 8, 12)
    ]
    await gateway.step(job.id, "fine_tune", checkpoint={"base_model": TINY, "epochs": epochs})
    checkpoints = [checkpoint async for checkpoint in gateway.ada.checkpoints.list(job.id, limit=2)]
    assert [checkpoint.step_number for checkpoint in checkpoints] == [12, 8, 4]
    assert (checkpoints[0].created_at, checkpoints[0].metrics.train_loss) == (int(moment.timestamp()), 2.0)
    assert checkpoints[0].metrics.valid_loss is None
    with pytest.raises(openai.BadRequestError, match="no checkpoint"):
        await gateway.ada.checkpoints.list(job.id, after="ftckpt_x_1")
    name = checkpoints[1].fine_tuned_model_checkpoint
    assert name == f"ft:{TINY}:ada:demo:{job.id.removeprefix('job_')}:ckpt-step-8"
    assert (
        await gateway.resolve(name)
        == await gateway.resolve(name, "admin")
        == ModelFolder(epochs[1]["address"], TINY, moment)
    )
    for wrong, username in ((name, "bob"), (name.replace("-8", "-9"), "ada"), (name.replace("demo", "other"), "ada")):
        with pytest.raises(ModelNotFound):
            await gateway.resolve(wrong, username)
    with pytest.raises(openai.BadRequestError, match="never exported"):
        await gateway.create(model=name)


async def test_a_model_without_an_export_has_a_name(gateway: Gateway) -> None:
    async with gateway.database.transaction() as session:
        request = JobRequest(kind="fine_tune", spec={"data": {"dataset": "demo/homelab"}})
        job = await queue.enqueue(session, request, gateway.owners["ada"])
    name = f"ft:{TINY}:ada::{job.id.removeprefix('job_')}"
    with pytest.raises(ModelNotFound, match="is queued"):
        await gateway.resolve(name)
    moment = now()
    result = {"model": storage.address("jobs/x/model"), "base_model": TINY}
    await gateway.update_job(job.id, state=State.SUCCEEDED, result=result, finished_at=moment)
    assert (await gateway.ada.retrieve(job.id)).fine_tuned_model == name
    assert await gateway.resolve(name) == ModelFolder(result["model"], TINY, moment)
    assert name in {card.id async for card in gateway.clients["ada"].models.list()}
    assert (await gateway.clients["ada"].models.retrieve(name)).owned_by == "forgearr"
    assert name not in {card.id async for card in gateway.clients["bob"].models.list()}
    with pytest.raises(openai.NotFoundError):
        await gateway.clients["bob"].models.retrieve(name)


@pytest.mark.both_databases
async def test_an_idempotency_key_makes_one_job(gateway: Gateway) -> None:
    file_id = await gateway.file(SAMPLE)
    options: Any = {"training_file": file_id, "extra_headers": {"Idempotency-Key": "once"}}
    first, second = [await gateway.create(**options) for _ in range(2)]
    assert first.id == second.id
