"""Batches on a whole platform, through OpenAI's client: completion, cancellation, expiry, and killed processes."""

import json
import sqlite3
from contextlib import closing
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion

from tests.support.platform import Platform
from tests.support.waiting import TIMEOUT, eventually

pytestmark = pytest.mark.platform

TINY = "forgearr/tiny"
FINAL_STATUSES = {"failed", "completed", "expired", "cancelled"}
CHAT, EMBEDDINGS, RESPONSES = "/v1/chat/completions", "/v1/embeddings", "/v1/responses"


def test_a_batch_completes_with_an_output_and_an_error_file(client: openai.OpenAI) -> None:
    lines = [chat(number, max_tokens=3) for number in range(6)]
    lines[2]["body"]["temperature"] = 9
    lines[3]["body"]["model"] = "nobody"
    lines[4]["body"]["stream"] = True
    batch = submit(client, lines, metadata={"night": "1"}, output_expires_after=expires_after(3600))
    assert (batch.status, batch.metadata, batch.completion_window) == ("validating", {"night": "1"}, "24h")
    assert batch.expires_at - batch.created_at == 24 * 3600
    done = wait(client, batch.id)
    assert (done.status, done.model, done.errors) == ("completed", None, None)
    assert done.request_counts.to_dict() == {"total": 6, "completed": 3, "failed": 3}
    assert done.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at
    completed = read_results(client, done.output_file_id)
    assert completed.keys() == {"request-0", "request-1", "request-5"}
    for line in completed.values():
        assert (line["response"]["status_code"], line["error"]) == (200, None)
        completion: Any = ChatCompletion.model_validate(line["response"]["body"])
        assert (completion.choices[0].finish_reason, completion.usage.completion_tokens) == ("length", 3)
    assert done.usage.output_tokens == 9
    assert done.usage.total_tokens == done.usage.input_tokens + 9 > 9
    failures = read_results(client, done.error_file_id)
    assert {name: line["response"]["status_code"] for name, line in failures.items()} == {
        "request-2": 422,
        "request-3": 404,
        "request-4": 400,
    }
    assert failures["request-2"]["response"]["body"]["error"]["param"] == "temperature"
    file: Any = client.files.retrieve(done.output_file_id)
    assert (file.purpose, file.expires_at - file.created_at) == ("batch_output", 3600)


def test_a_batch_can_call_every_endpoint(client: openai.OpenAI) -> None:
    bodies = {
        EMBEDDINGS: {"input": ["one", "two"], "dimensions": 8},
        "/v1/completions": {"prompt": "Once", "max_tokens": 2},
        RESPONSES: {"input": "Hello", "max_output_tokens": 2},
    }
    for endpoint, body in bodies.items():
        line = {"custom_id": "one", "method": "POST", "url": endpoint, "body": {"model": TINY, **body}}
        done = wait(client, submit(client, [line], endpoint=endpoint).id)
        assert (done.status, done.model, done.error_file_id) == ("completed", TINY, None), endpoint
        response = read_results(client, done.output_file_id)["one"]["response"]["body"]
        assert response["usage"]["total_tokens"] == done.usage.total_tokens > 0
        if endpoint == RESPONSES:
            assert client.responses.retrieve(response["id"]).status == "incomplete"


def test_an_invalid_batch_file_fails_the_batch(client: openai.OpenAI) -> None:
    lines = [chat(0), chat(0), {**chat(2), "url": EMBEDDINGS}, {"custom_id": "x"}]
    failed = wait(client, submit(client, lines).id)
    assert (failed.status, failed.output_file_id) == ("failed", None)
    assert failed.failed_at >= failed.created_at
    assert [(error.line, error.code) for error in failed.errors.data] == [
        (2, "duplicate_custom_id"),
        (3, "mismatched_endpoint"),
        (4, "invalid_batch_line"),
    ]
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(failed.id)
    with pytest.raises(openai.NotFoundError):
        client.batches.create(input_file_id="file-none", endpoint=CHAT, completion_window="24h")
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch_none")
    data = client.files.create(file=("x.txt", b"x"), purpose="user_data")
    with pytest.raises(openai.BadRequestError):
        client.batches.create(input_file_id=data.id, endpoint=CHAT, completion_window="24h")
    wrong: Any = {"endpoint": "/v1/moderations"}
    with pytest.raises(openai.UnprocessableEntityError):
        submit(client, [chat(0)], **wrong)


@pytest.mark.deep
def test_a_cancelled_batch_keeps_its_completed_requests(client: openai.OpenAI) -> None:
    batch = submit(client, [chat(number, max_tokens=60) for number in range(2000)])
    eventually(lambda: counts(client, batch.id).get("completed"))
    cancelling = client.batches.cancel(batch.id)
    assert cancelling.status == "cancelling"
    assert client.batches.cancel(batch.id).cancelling_at == cancelling.cancelling_at
    cancelled = wait(client, batch.id)
    assert (cancelled.status, cancelled.error_file_id) == ("cancelled", None)
    assert cancelled.cancelled_at >= cancelled.cancelling_at
    assert 0 < cancelled.request_counts.completed < 2000
    assert len(read_results(client, cancelled.output_file_id)) == cancelled.request_counts.completed


@pytest.mark.deep
def test_an_expired_batch_lists_the_requests_it_did_not_run(client: openai.OpenAI, platform: Platform) -> None:
    batch = submit(client, [chat(number, max_tokens=60) for number in range(1000)])
    eventually(lambda: counts(client, batch.id).get("completed"))
    with closing(sqlite3.connect(platform.home / "forgearr.db", timeout=TIMEOUT, isolation_level=None)) as database:
        database.execute("UPDATE batches SET expires_at = created_at WHERE id = ?", (batch.id,))
    expired = wait(client, batch.id)
    assert expired.status == "expired"
    assert expired.expired_at >= expired.finalizing_at
    completed, failures = read_results(client, expired.output_file_id), read_results(client, expired.error_file_id)
    assert completed.keys() | failures.keys() == {f"request-{number}" for number in range(1000)}
    assert completed
    assert not completed.keys() & failures.keys()
    assert {line["error"]["code"] for line in failures.values()} == {"batch_expired"}
    assert expired.request_counts.to_dict() == {"total": 1000, "completed": len(completed), "failed": len(failures)}


@pytest.mark.deep
@pytest.mark.parametrize("part", ["ray::Worker", "ray::ServeReplica:forgearr:gguf", "everything"])
def test_each_request_has_one_result_after_a_killed_process(
    client: openai.OpenAI, platform: Platform, part: str
) -> None:
    total = 400
    for _ in range(10):
        batch = submit(client, [chat(number, max_tokens=30) for number in range(total)])
        eventually(lambda batch=batch: counts(client, batch.id).get("completed"))
        attempts = attempts_of(platform, batch.job_id)
        if part == "everything":
            platform.cut_the_power()
            platform.up()
        else:
            platform.kill(part)
        if platform.job(batch.job_id)["state"] != "succeeded":
            break
    else:
        pytest.fail("each of ten batches finished before the process was killed")
    done = wait(client, batch.id)
    assert done.status == "completed"
    assert done.error_file_id is None
    assert "Serve" in part or attempts_of(platform, batch.job_id) > attempts
    assert done.request_counts.to_dict() == {"total": total, "completed": total, "failed": 0}
    completed = read_results(client, done.output_file_id)
    assert completed.keys() == {f"request-{number}" for number in range(total)}
    assert done.usage.output_tokens == sum(
        line["response"]["body"]["usage"]["completion_tokens"] for line in completed.values()
    )
    assert not list((platform.home / "storage" / "batches").iterdir())


@pytest.mark.deep
def test_a_batch_waits_while_its_job_is_paused(client: openai.OpenAI, platform: Platform) -> None:
    batch = submit(client, [chat(number, max_tokens=30) for number in range(1000)])
    eventually(lambda: counts(client, batch.id).get("completed"))
    assert platform.http.post(f"/api/v1/jobs/{batch.job_id}/pause").is_success
    platform.wait_for(batch.job_id, "paused")
    paused = counts(client, batch.id)
    assert 0 < paused["completed"] < 1000
    assert client.batches.retrieve(batch.id).status == "in_progress"
    # A cancelled batch resumes only to finalize.
    client.batches.cancel(batch.id)
    cancelled = wait(client, batch.id)
    assert cancelled.status == "cancelled"
    assert len(read_results(client, cancelled.output_file_id)) >= paused["completed"]


@pytest.mark.deep
def test_only_the_job_of_a_batch_can_run_it(client: openai.OpenAI, platform: Platform) -> None:
    done = wait(client, submit(client, [chat(0, max_tokens=1)]).id)
    other = platform.wait_for(platform.submit("batch", spec={"batch_id": done.id}))
    assert (other["state"], other["error"]["code"]) == ("failed", "batch_not_found")
    assert client.batches.retrieve(done.id) == done


@pytest.mark.deep
def test_a_batch_whose_job_is_cancelled_is_cancelled(client: openai.OpenAI, platform: Platform) -> None:
    batch = submit(client, [chat(number, max_tokens=60) for number in range(2000)])
    eventually(lambda: counts(client, batch.id).get("completed"))
    assert platform.http.post(f"/api/v1/jobs/{batch.job_id}/cancel").is_success
    cancelled = wait(client, batch.id)
    assert (cancelled.status, cancelled.output_file_id) == ("cancelled", None)
    assert cancelled.cancelled_at >= cancelled.created_at


@pytest.mark.deep
def test_batches_are_listed_in_pages(client: openai.OpenAI) -> None:
    submitted = [submit(client, [chat(0, max_tokens=1)]).id for _ in range(3)]
    listed = [batch.id for batch in client.batches.list(limit=2)]
    assert listed[:3] == submitted[::-1]
    assert len(set(listed)) == len(listed)
    for batch_id in submitted:
        wait(client, batch_id)


def chat(number: int, **options: Any) -> dict[str, Any]:
    body = {"model": TINY, "messages": [{"role": "user", "content": f"Tell me about {number}"}], **options}
    return {"custom_id": f"request-{number}", "method": "POST", "url": CHAT, "body": body}


def expires_after(seconds: int) -> Any:
    return {"anchor": "created_at", "seconds": seconds}


def submit(client: openai.OpenAI, lines: list[dict[str, Any]], **options: Any) -> Any:
    content = "\n".join(json.dumps(line) for line in lines).encode()
    file = client.files.create(file=("batch.jsonl", content), purpose="batch")
    create: Any = client.batches.create
    return create(**{"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h", **options})


def wait(client: openai.OpenAI, batch_id: str) -> Any:
    def ended() -> Any:
        batch = client.batches.retrieve(batch_id)
        return batch if batch.status in FINAL_STATUSES else None

    return eventually(ended)


def counts(client: openai.OpenAI, batch_id: str) -> dict[str, int]:
    request_counts = client.batches.retrieve(batch_id).request_counts
    return request_counts.model_dump() if request_counts else {}


def attempts_of(platform: Platform, job_id: str) -> int:
    """Count how often a worker has started the job."""
    events = platform.http.get(f"/api/v1/jobs/{job_id}/events", params={"limit": 500}).json()["items"]
    return sum(event["type"] == "running" for event in events)


def read_results(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    """Read the results in a file by custom_id. Each line must be about another request."""
    assert file_id is not None
    lines = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    results = {line["custom_id"]: line for line in lines}
    assert len(results) == len(lines)
    return results
