"""Fine-tuning with OpenAI's client on a whole platform, from a file to a served model."""

import asyncio
import csv
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from tests.support.platform import Platform, running_platform
from tests.support.waiting import TIMEOUT, eventually, eventually_async

pytestmark = [pytest.mark.platform, pytest.mark.deep]

SERVICES = ["Sonarr", "Radarr", "Plex"]
EPOCHS = 5
METADATA = {"team": "home lab & Söhne", "run": "1"}


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    with running_platform({"engines.context": "512"}) as platform:
        yield platform


@pytest.fixture(scope="module")
def client(platform: Platform) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{platform.url}/v1", api_key="not-needed", max_retries=0, timeout=TIMEOUT) as client:
        yield client


@pytest.fixture(scope="module")
def tuned(client: openai.OpenAI) -> FineTuningJob:
    """A fine-tuning job that has succeeded."""
    training = client.files.create(file=("train.jsonl", content(24)), purpose="fine-tune")
    validation = client.files.create(file=("valid.jsonl", content(6)), purpose="fine-tune")
    hyperparameters: Any = {"n_epochs": EPOCHS, "batch_size": 4, "learning_rate_multiplier": 20}
    job = client.fine_tuning.jobs.create(
        model="forgearr/tiny",
        training_file=training.id,
        validation_file=validation.id,
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        suffix="My Services",
        seed=7,
        metadata=METADATA,
    )
    assert job.status == "queued"
    assert (job.fine_tuned_model, job.trained_tokens, job.finished_at, job.error) == (None, None, None, None)
    done = eventually(lambda: finished_job(client, job.id))
    assert done.status == "succeeded", done.error
    return done


def test_the_job_describes_the_training(client: openai.OpenAI, tuned: FineTuningJob) -> None:
    assert tuned.fine_tuned_model == f"ft:forgearr/tiny:local:my-services:{tuned.id.removeprefix('job_')}"
    assert (tuned.model, tuned.seed, tuned.metadata, tuned.error) == ("forgearr/tiny", 7, METADATA, None)
    assert tuned.hyperparameters.to_dict() == {"batch_size": 4, "learning_rate_multiplier": 20.0, "n_epochs": EPOCHS}
    assert tuned.method
    assert tuned.method.supervised
    assert tuned.method.supervised.hyperparameters
    assert tuned.method.supervised.hyperparameters.to_dict() == tuned.hyperparameters.to_dict()
    assert tuned.finished_at
    assert tuned.created_at < tuned.finished_at
    assert tuned.estimated_finish is None
    assert tuned.trained_tokens
    assert tuned.trained_tokens > EPOCHS * 24 * 10


def test_the_result_file_has_a_row_for_each_step(client: openai.OpenAI, tuned: FineTuningJob) -> None:
    (file_id,) = tuned.result_files
    assert client.files.retrieve(file_id).purpose == "fine-tune-results"
    rows = list(csv.DictReader(client.files.content(file_id).text.splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(1, EPOCHS * 6 + 1))
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    evaluated = [int(row["step"]) for row in rows if row["valid_loss"]]
    assert evaluated == [6 * epoch for epoch in range(1, EPOCHS + 1)]
    assert 0 < float(rows[-1]["train_accuracy"]) <= 1
    assert file_id in {file.id for file in client.files.list(purpose="fine-tune-results")}


def test_the_events_are_paginated(client: openai.OpenAI, tuned: FineTuningJob) -> None:
    events = list(client.fine_tuning.jobs.list_events(tuned.id, limit=7))
    assert len({event.id for event in events}) == len(events) > 7
    messages = [event.message for event in reversed(events)]
    assert messages[0] == f"Created fine-tuning job: {tuned.id}"
    assert messages[-1] == "The job has successfully completed"
    assert messages.index("Fine-tuning job started") < messages.index("Checkpoint created at step 6")
    metrics: list[Any] = [event.data for event in reversed(events) if event.type == "metrics"]
    assert [data["step"] for data in metrics if "train_loss" in data] == list(range(1, EPOCHS * 6 + 1))
    assert len([data for data in metrics if "valid_loss" in data]) == EPOCHS
    newest = client.fine_tuning.jobs.list_events(tuned.id, limit=1)
    assert ([event.id for event in newest.data], newest.has_more) == ([events[0].id], True)


def test_the_model_is_served_by_every_api(platform: Platform, client: openai.OpenAI, tuned: FineTuningJob) -> None:
    model = tuned.fine_tuned_model
    assert model
    completion = client.chat.completions.create(model=model, messages=question(1), temperature=0, max_tokens=20)
    assert (completion.model, completion.choices[0].message.content) == (model, "Number 1 is Radarr.")
    assert client.completions.create(model=model, prompt="Number", max_tokens=2).usage
    request = {
        "model": model,
        "messages": question(1),
        "stream": False,
        "options": {"temperature": 0, "num_predict": 20},
    }
    response = platform.http.post("/api/chat", json=request)
    assert response.json()["message"]["content"] == "Number 1 is Radarr."
    assert model in {card.id for card in client.models.list()}
    assert client.models.retrieve(model).id == model
    for unknown in (f"{model}x", model.replace("my-services", "others"), f"{model}:ckpt-step-1"):
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model=unknown, messages=question(1))


def test_the_last_epochs_are_checkpoints(client: openai.OpenAI, tuned: FineTuningJob) -> None:
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(tuned.id, limit=2))
    assert [checkpoint.step_number for checkpoint in checkpoints] == [30, 24, 18]
    assert {checkpoint.fine_tuning_job_id for checkpoint in checkpoints} == {tuned.id}
    assert checkpoints[0].fine_tuned_model_checkpoint == f"{tuned.fine_tuned_model}:ckpt-step-30"
    for checkpoint in (checkpoints[0], checkpoints[-1]):
        model = checkpoint.fine_tuned_model_checkpoint
        completion = client.chat.completions.create(model=model, messages=question(1), temperature=0, max_tokens=20)
        assert completion.model == model
        assert client.models.retrieve(model).id == model
        if checkpoint is checkpoints[0]:
            assert completion.choices[0].message.content == "Number 1 is Radarr."
    with pytest.raises(openai.BadRequestError, match="never exported"):
        client.models.delete(checkpoints[0].fine_tuned_model_checkpoint)
    losses = [checkpoint.metrics.train_loss for checkpoint in reversed(checkpoints)]
    assert all(
        checkpoint.metrics.full_valid_loss and checkpoint.metrics.train_mean_token_accuracy
        for checkpoint in checkpoints
    )
    assert losses == sorted((loss or 0 for loss in losses), reverse=True)


def test_fine_tuning_jobs_and_forge_jobs_are_the_same_jobs(
    platform: Platform, client: openai.OpenAI, tuned: FineTuningJob
) -> None:
    """A job that was submitted to the forge is listed here too."""
    job = platform.job(tuned.id)
    assert (job["kind"], job["result"]["deploy"]) == ("forge", None)
    job_id = platform.submit("fine_tune", spec={"data": {"dataset": "demo/homelab"}, "max_steps": 2, "batch_size": 4})
    other = eventually(lambda: finished_job(client, job_id))
    assert (other.status, other.training_file, other.metadata) == ("succeeded", "demo/homelab", None)
    assert other.trained_tokens
    assert other.result_files
    assert [listed.id for listed in client.fine_tuning.jobs.list()] == [job_id, tuned.id]
    assert [listed.id for listed in client.fine_tuning.jobs.list(limit=1)] == [job_id, tuned.id]
    assert [listed.id for listed in client.fine_tuning.jobs.list(metadata={"run": "1"})] == [tuned.id]
    assert [listed.id for listed in client.fine_tuning.jobs.list(metadata={"run": "2"})] == []


def test_preference_training_changes_the_answers_of_a_tuned_model(client: openai.OpenAI, tuned: FineTuningJob) -> None:
    """The pairs prefer other answers than those that the model was tuned on."""
    assert tuned.fine_tuned_model
    pairs = client.files.create(file=("pairs.jsonl", preferences(24)), purpose="fine-tune")
    hyperparameters: Any = {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 5, "beta": 0.1}
    job = client.fine_tuning.jobs.create(
        model=tuned.fine_tuned_model,
        training_file=pairs.id,
        method={"type": "dpo", "dpo": {"hyperparameters": hyperparameters}},
        seed=7,
    )
    done = eventually(lambda: finished_job(client, job.id))
    assert (done.status, done.error) == ("succeeded", None)
    assert done.method
    assert done.method.dpo
    assert done.method.dpo.hyperparameters
    assert done.method.dpo.hyperparameters.to_dict() == hyperparameters
    assert done.fine_tuned_model
    (file_id,) = done.result_files
    rows = list(csv.DictReader(client.files.content(file_id).text.splitlines()))
    assert (len(rows), float(rows[-1]["train_accuracy"])) == (18, 1)  # in every pair the preferred answer is likelier
    completion = client.chat.completions.create(
        model=done.fine_tuned_model, messages=question(1), temperature=0, max_tokens=20
    )
    assert completion.model == done.fine_tuned_model
    assert completion.choices[0].message.content not in {None, answer(1)}


def test_the_asynchronous_client_pauses_resumes_and_cancels_a_job(platform: Platform, tuned: FineTuningJob) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{platform.url}/v1", api_key="not-needed") as client:
            file = await client.files.create(file=("train.jsonl", content(24)), purpose="fine-tune")
            jobs = client.fine_tuning.jobs
            assert tuned.fine_tuned_model
            job = await jobs.create(
                model=tuned.fine_tuned_model, training_file=file.id, hyperparameters={"n_epochs": 1000, "batch_size": 4}
            )

            async def wait_until(status: str) -> FineTuningJob:
                async with asyncio.timeout(TIMEOUT):
                    while (current := await jobs.retrieve(job.id)).status != status:
                        assert current.status not in {"failed", "succeeded"}, current.error
                        await asyncio.sleep(0.2)
                return current

            await wait_until("running")

            def estimated_finish() -> int | None:
                return platform.http.get(f"/v1/fine_tuning/jobs/{job.id}").json()["estimated_finish"]

            assert await eventually_async(estimated_finish) >= job.created_at
            await jobs.pause(job.id)
            await wait_until("paused")
            messages = [event.message async for event in jobs.list_events(job.id)]
            assert "Fine-tuning job paused" in messages
            await jobs.resume(job.id)
            await wait_until("running")
            assert (await jobs.cancel(job.id)).id == job.id
            cancelled = await wait_until("cancelled")
            assert (cancelled.fine_tuned_model, cancelled.error) == (None, None)
            with pytest.raises(openai.ConflictError):
                await jobs.cancel(job.id)

    asyncio.run(run())


def test_the_model_can_be_deleted(client: openai.OpenAI, tuned: FineTuningJob) -> None:
    model = tuned.fine_tuned_model
    assert model
    assert client.models.delete(model).deleted
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=model, messages=question(1))
    assert model not in {card.id for card in client.models.list()}


def content(count: int) -> bytes:
    lines = [{"messages": [*question(n), {"role": "assistant", "content": answer(n)}]} for n in range(count)]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def preferences(count: int) -> bytes:
    lines = [
        {
            "input": {"messages": question(n)},
            "preferred_output": [{"role": "assistant", "content": f"Number {n % 3} is {SERVICES[(n + 1) % 3]}."}],
            "non_preferred_output": [{"role": "assistant", "content": answer(n)}],
        }
        for n in range(count)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def question(number: int) -> list[Any]:
    return [{"role": "user", "content": f"Which service is number {number % 3}?"}]


def answer(number: int) -> str:
    return f"Number {number % 3} is {SERVICES[number % 3]}."


def finished_job(client: openai.OpenAI, job_id: str) -> FineTuningJob | None:
    job = client.fine_tuning.jobs.retrieve(job_id)
    return job if job.status in {"succeeded", "failed", "cancelled"} else None
