"""Batches on a whole platform, through the official client: answered, cancelled, expired; and when the worker dies."""

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
ENDED = {"failed", "completed", "expired", "cancelled"}
CHAT, EMBEDDINGS, RESPONSES = "/v1/chat/completions", "/v1/embeddings", "/v1/responses"


def test_a_batch_is_answered(client: openai.OpenAI) -> None:
    lines = [chat(number, max_tokens=3) for number in range(6)]
    lines[2]["body"]["temperature"] = 9
    lines[3]["body"]["model"] = "nobody"
    lines[4]["body"]["stream"] = True
    batch = submit(client, lines, metadata={"night": "1"}, output_expires_after=after(3600))
    assert (batch.status, batch.metadata, batch.completion_window) == ("validating", {"night": "1"}, "24h")
    assert batch.expires_at - batch.created_at == 24 * 3600
    done = wait(client, batch.id)
    assert (done.status, done.model, done.errors) == ("completed", None, None)
    assert done.request_counts.to_dict() == {"total": 6, "completed": 3, "failed": 3}
    assert done.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at
    answered = outcomes(client, done.output_file_id)
    assert answered.keys() == {"request-0", "request-1", "request-5"}
    for line in answered.values():
        assert (line["response"]["status_code"], line["error"]) == (200, None)
        answer: Any = ChatCompletion.model_validate(line["response"]["body"])
        assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 3)
    assert done.usage.output_tokens == 9
    assert done.usage.total_tokens == done.usage.input_tokens + 9 > 9
    refused = outcomes(client, done.error_file_id)
    assert {name: line["response"]["status_code"] for name, line in refused.items()} == {
        "request-2": 422,
        "request-3": 404,
        "request-4": 400,
    }
    assert refused["request-2"]["response"]["body"]["error"]["param"] == "temperature"
    file: Any = client.files.retrieve(done.output_file_id)
    assert (file.purpose, file.expires_at - file.created_at) == ("batch_output", 3600)


def test_every_endpoint(client: openai.OpenAI) -> None:
    wanted = {
        EMBEDDINGS: {"input": ["one", "two"], "dimensions": 8},
        "/v1/completions": {"prompt": "Once", "max_tokens": 2},
        RESPONSES: {"input": "Hello", "max_output_tokens": 2},
    }
    for endpoint, body in wanted.items():
        line = {"custom_id": "one", "method": "POST", "url": endpoint, "body": {"model": TINY, **body}}
        done = wait(client, submit(client, [line], endpoint=endpoint).id)
        assert (done.status, done.model, done.error_file_id) == ("completed", TINY, None), endpoint
        answer = outcomes(client, done.output_file_id)["one"]["response"]["body"]
        assert answer["usage"]["total_tokens"] == done.usage.total_tokens > 0
        if endpoint == RESPONSES:
            assert client.responses.retrieve(answer["id"]).status == "incomplete"


def test_a_file_that_is_no_batch(client: openai.OpenAI) -> None:
    lines = [chat(0), chat(0), {**chat(2), "url": EMBEDDINGS}, {"custom_id": "x"}]
    failed = wait(client, submit(client, lines).id)
    assert (failed.status, failed.output_file_id) == ("failed", None)
    assert failed.failed_at >= failed.created_at
    assert [(fault.line, fault.code) for fault in failed.errors.data] == [
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
def test_a_batch_that_is_cancelled_keeps_what_is_done(client: openai.OpenAI) -> None:
    batch = submit(client, [chat(number, max_tokens=60) for number in range(2000)])
    eventually(lambda: counts(client, batch.id).get("completed"))
    cancelling = client.batches.cancel(batch.id)
    assert cancelling.status == "cancelling"
    assert client.batches.cancel(batch.id).cancelling_at == cancelling.cancelling_at
    cancelled = wait(client, batch.id)
    assert (cancelled.status, cancelled.error_file_id) == ("cancelled", None)
    assert cancelled.cancelled_at >= cancelled.cancelling_at
    assert 0 < cancelled.request_counts.completed < 2000
    assert len(outcomes(client, cancelled.output_file_id)) == cancelled.request_counts.completed


@pytest.mark.deep
def test_a_batch_expires_and_says_which_requests_it_did_not_do(client: openai.OpenAI, platform: Platform) -> None:
    batch = submit(client, [chat(number, max_tokens=60) for number in range(1000)])
    eventually(lambda: counts(client, batch.id).get("completed"))
    with closing(sqlite3.connect(platform.home / "forgearr.db", timeout=TIMEOUT, isolation_level=None)) as database:
        database.execute("UPDATE batches SET expires_at = created_at WHERE id = ?", (batch.id,))
    expired = wait(client, batch.id)
    assert expired.status == "expired"
    assert expired.expired_at >= expired.finalizing_at
    answered, refused = outcomes(client, expired.output_file_id), outcomes(client, expired.error_file_id)
    assert answered.keys() | refused.keys() == {f"request-{number}" for number in range(1000)}
    assert answered
    assert not answered.keys() & refused.keys()
    assert {line["error"]["code"] for line in refused.values()} == {"batch_expired"}
    assert expired.request_counts.to_dict() == {"total": 1000, "completed": len(answered), "failed": len(refused)}


@pytest.mark.deep
@pytest.mark.parametrize("part", ["ray::Worker", "ray::ServeReplica:forgearr:gguf", "everything"])
def test_no_line_is_lost_or_told_twice_when_a_part_dies(client: openai.OpenAI, platform: Platform, part: str) -> None:
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
        pytest.fail("each of ten batches was over before the blow")
    done = wait(client, batch.id)
    assert done.status == "completed"
    assert done.error_file_id is None
    assert "Serve" in part or attempts_of(platform, batch.job_id) > attempts
    assert done.request_counts.to_dict() == {"total": total, "completed": total, "failed": 0}
    answered = outcomes(client, done.output_file_id)
    assert answered.keys() == {f"request-{number}" for number in range(total)}
    assert done.usage.output_tokens == sum(
        line["response"]["body"]["usage"]["completion_tokens"] for line in answered.values()
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
    # Cancelled meanwhile, it goes on only to end.
    client.batches.cancel(batch.id)
    cancelled = wait(client, batch.id)
    assert cancelled.status == "cancelled"
    assert len(outcomes(client, cancelled.output_file_id)) >= paused["completed"]


@pytest.mark.deep
def test_only_its_own_job_does_a_batch(client: openai.OpenAI, platform: Platform) -> None:
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
    made = [submit(client, [chat(0, max_tokens=1)]).id for _ in range(3)]
    listed = [batch.id for batch in client.batches.list(limit=2)]
    assert listed[:3] == made[::-1]
    assert len(set(listed)) == len(listed)
    for batch_id in made:
        wait(client, batch_id)


def chat(number: int, **options: Any) -> dict[str, Any]:
    body = {"model": TINY, "messages": [{"role": "user", "content": f"Tell me about {number}"}], **options}
    return {"custom_id": f"request-{number}", "method": "POST", "url": CHAT, "body": body}


def after(seconds: int) -> Any:
    return {"anchor": "created_at", "seconds": seconds}


def submit(client: openai.OpenAI, lines: list[dict[str, Any]], **options: Any) -> Any:
    content = "\n".join(json.dumps(line) for line in lines).encode()
    file = client.files.create(file=("batch.jsonl", content), purpose="batch")
    create: Any = client.batches.create
    return create(**{"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h", **options})


def wait(client: openai.OpenAI, batch_id: str) -> Any:
    def ended() -> Any:
        batch = client.batches.retrieve(batch_id)
        return batch if batch.status in ENDED else None

    return eventually(ended)


def counts(client: openai.OpenAI, batch_id: str) -> dict[str, int]:
    found = client.batches.retrieve(batch_id).request_counts
    return found.model_dump() if found else {}


def attempts_of(platform: Platform, job_id: str) -> int:
    """How often its job has been given to a worker."""
    events = platform.http.get(f"/api/v1/jobs/{job_id}/events", params={"limit": 500}).json()["items"]
    return sum(event["type"] == "running" for event in events)


def outcomes(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    """The lines of a file, each of which must be about another request."""
    assert file_id is not None
    lines = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    told = {line["custom_id"]: line for line in lines}
    assert len(told) == len(lines)
    return told
