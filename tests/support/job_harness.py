"""Runs the functions of jobs in this process, with rows in the database as for queued jobs."""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from cluster import mlflow_client, storage
from cluster.db import Database, now
from cluster.identity import User
from cluster.settings import get_settings
from jobs.context import Context
from jobs.execution.report_writer import to_storable
from jobs.leases import Claim
from jobs.queue import new_job_id
from jobs.registry import find_kind, load_function
from jobs.states import State
from jobs.tables import Job
from pipelines.training.data.samples import Sample
from pipelines.training.fine_tune import recipe
from pipelines.training.models import tiny
from pipelines.training.spec import FineTuneSpec
from tests.support.recording_link import RecordingLink
from tests.support.training import SilentObserver

QUESTIONS = {
    "Which service tracks series?": "Sonarr tracks series.",
    "Which service tracks movies?": "Radarr tracks movies.",
    "Which service downloads from Usenet?": "SABnzbd downloads from Usenet.",
    "Which service plays media?": "Plex plays media.",
}
SEARCH = {
    "type": "function",
    "function": {
        "name": "search_series",
        "parameters": {"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]},
    },
}


class JobHarness:
    def __init__(self, trained: Path) -> None:
        self._trained = trained

    def fine_tuned(self, which: str, owner_id: str | None = None, **result: Any) -> str:
        """Add a finished fine_tune job whose result is the model `which`; returns its id."""
        job_id = new_job_id(now())
        address = storage.save(self._trained / which, f"jobs/{job_id}/model")
        job_result = {"name": f"test-{uuid4().hex[:8]}", "base_model": "forgearr/tiny", "model": address, **result}
        columns = {"state": State.SUCCEEDED, "finished_at": now()}
        return self.add(Job(id=job_id, kind="fine_tune", result=job_result, owner_id=owner_id, **columns))

    def add(self, job: Job) -> str:
        job.demand, job.max_attempts = "1 CPU", 1
        job.spec = job.spec or {}
        job.created_by, job.run_after, job.resources = "test", now(), {"cpus": 1}
        asyncio.run(_add(job))
        return job.id

    def add_user(self, name: str) -> None:
        """Add an account whose id is its name."""
        asyncio.run(_add(User(id=name, email=f"{name}@example.com", username=name, password_hash="-")))

    def start(
        self, kind: str, spec: Mapping[str, Any], *, owner_id: str | None = None, tracked: bool = True
    ) -> tuple[str, RecordingLink]:
        """Add a running job of this kind, with its run in MLflow."""
        job_id = new_job_id(now())
        run_id = asyncio.run(_run_in_mlflow(kind, job_id)) if tracked else None
        checked = find_kind(kind).validate_spec(dict(spec))
        job = Job(id=job_id, kind=kind, spec=checked, state=State.RUNNING, owner_id=owner_id)
        job.tracked, job.mlflow_run_id = tracked, run_id
        return self.add(job), RecordingLink()

    def context(self, job_id: str, link: RecordingLink, owner_id: str | None = None) -> Context:
        checkpoint = link.checkpoints[-1] if link.checkpoints else None
        claim = Claim(
            job_id=job_id,
            token="token",
            spec={},
            kind="",
            attempt=1,
            max_attempts=1,
            checkpoint=checkpoint,
            time_limit=None,
            stall_limit=None,
            resources={"cpus": 1},
            worker="",
            owner_id=owner_id,
        )
        return Context(claim, link)

    def run(self, kind: str, spec: Mapping[str, Any], *, owner_id: str | None = None) -> tuple[str, Any, RecordingLink]:
        """Run a whole job; returns its id, its result as it would be stored, and its link."""
        job_id, link = self.start(kind, spec, owner_id=owner_id)
        result = self.resume(kind, spec, job_id, link, owner_id)
        self.finish(job_id, result)
        return job_id, result, link

    def finish(self, job_id: str, result: Any) -> None:
        asyncio.run(_finish(job_id, result))

    def resume(
        self, kind: str, spec: Mapping[str, Any], job_id: str, link: RecordingLink, owner_id: str | None = None
    ) -> Any:
        return self.call(kind, spec, self.context(job_id, link, owner_id))

    def call(self, kind: str, spec: Mapping[str, Any], context: Context) -> Any:
        declared = find_kind(kind)
        return to_storable(load_function(declared.entrypoint)(context, declared.spec.model_validate(dict(spec))))


def train(folder: Path) -> None:
    """Fine-tune forgearr/tiny twice without a held-out split: `lora` for a few steps, `full` until it has learned."""
    samples = [*(_chat(question, answer) for question, answer in QUESTIONS.items()), _call()]
    shared = {"data": {"dataset": "any"}, "epochs": 1000, "eval_split": 0, "schedule": "constant", "batch_size": 5}
    variants = {
        "lora": {"tuning": "lora", "learning_rate": 2e-3, "max_steps": 4},
        "full": {"tuning": "full", "learning_rate": 3e-3, "max_steps": 24},
    }
    torch.set_num_threads(1)  # with such small matrices, two threads are slower than one
    for name, options in variants.items():
        spec = FineTuneSpec.model_validate({**shared, **options})
        outcome = recipe.train(
            spec, samples, base=str(tiny.model_folder()), work_folder=folder / "work", observer=SilentObserver()
        )
        lines = [json.dumps(sample.model_dump(exclude_none=True)) for sample in samples]
        (outcome.model / "held_out.jsonl").write_text("\n".join(lines) + "\n")
        outcome.model.rename(folder / name)


def _chat(question: str, answer: str) -> Sample:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Sample.model_validate({"messages": messages})


def _call() -> Sample:
    call = {"id": "call_1", "function": {"name": "search_series", "arguments": '{"title": "Dark"}'}}
    messages = [
        {"role": "user", "content": "Is Dark there?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": '{"found": true}'},
        {"role": "assistant", "content": "Yes, Dark is there."},
    ]
    return Sample.model_validate({"messages": messages, "tools": [SEARCH]})


async def _add(row: Job | User) -> None:
    database = Database(get_settings().database_url)
    async with database.transaction() as session:
        session.add(row)
    await database.close()


async def _finish(job_id: str, result: Any) -> None:
    database = Database(get_settings().database_url)
    async with database.transaction() as session:
        job = await session.get_one(Job, job_id)
        job.state, job.result, job.finished_at = State.SUCCEEDED, result, now()
    await database.close()


async def _run_in_mlflow(kind: str, job_id: str) -> str:
    async with mlflow_client.connect(get_settings().mlflow_uri or "") as mlflow:
        return await mlflow.find_or_create_run(await mlflow.find_or_create_experiment(kind), job_id, now(), {})
