"""LLM02, disclosure of sensitive information: what somebody wants to learn of others' conversations."""

import json
import logging

import pytest

from cluster.logs import NOISY_LOGGERS
from tests.security.llm.conftest import Say
from tests.support.api_client import ApiClient

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)

MODEL = "forgearr/tiny"
QUESTION = "Where is the key of the cellar"
INSTRUCTIONS = "You are the butler of the house at the lake"
ANSWER = "Under the third stone of the stairs."
SECRETS = (QUESTION, INSTRUCTIONS, ANSWER)


async def ask(api: ApiClient) -> str:
    """A stored conversation of Ada's; returns the id of its last response."""
    body = {"model": MODEL, "input": QUESTION, "instructions": INSTRUCTIONS}
    response = await api.request("ada", "POST", "/v1/responses", json=body)
    assert ANSWER in response.text
    return response.json()["id"]


async def test_continue_or_read_anothers_conversation(api: ApiClient, say: Say) -> None:
    say(ANSWER)
    response_id = await ask(api)
    path = f"/v1/responses/{response_id}"
    (item,) = (await api.request("ada", "GET", f"{path}/input_items")).json()["data"]
    output = (await api.request("ada", "GET", path)).json()["output"][0]
    attempts = [
        ("POST", "/v1/responses", {"model": MODEL, "input": "And?", "previous_response_id": response_id}),
        ("POST", "/v1/responses", {"model": MODEL, "input": [{"type": "item_reference", "id": item["id"]}]}),
        ("POST", "/v1/responses", {"model": MODEL, "input": [{"type": "item_reference", "id": output["id"]}]}),
        ("GET", path, None),
        ("GET", f"{path}?stream=true", None),
        ("GET", f"{path}/input_items", None),
        ("POST", f"{path}/cancel", {}),
        ("DELETE", path, None),
    ]
    for method, address, body in attempts:
        refused = await api.request("bob", method, address, **({} if body is None else {"json": body}))
        assert refused.status_code == 404, (method, address)
        assert not any(secret in refused.text for secret in SECRETS)
        unknown = address.replace(response_id, "resp_" + "0" * 32)
        if unknown != address:
            missing = await api.request("bob", method, unknown, **({} if body is None else {"json": body}))
            assert missing.status_code == refused.status_code
    assert (await api.request("ada", "GET", path)).status_code == 200


async def test_read_others_conversations_in_logs_lists_or_numbers(
    api: ApiClient, say: Say, caplog: pytest.LogCaptureFixture
) -> None:
    say(ANSWER)
    for library in NOISY_LOGGERS:  # as every process of the platform does
        caplog.set_level(logging.WARNING, library)
    caplog.set_level(logging.DEBUG)
    await ask(api)
    messages = [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": QUESTION}]
    for wrong in ({}, {"temperature": 7}, {"model": "nobody:v1"}, {"max_tokens": "x"}, {"stop": 5}):
        body = {"model": MODEL, "messages": messages, **wrong}
        response = await api.request("ada", "POST", "/v1/chat/completions", json=body)
        assert not (response.is_error and QUESTION in response.text)
    batch = json.dumps({"model": MODEL, "prompt": QUESTION}).encode()
    await api.request("ada", "POST", "/api/generate", content=batch[:-1])
    for path in ("/metrics", "/health", "/api/v1/engines", "/api/ps", "/v1/models", "/v1/files", "/v1/batches"):
        seen = await api.request("bob", "GET", path)
        assert seen.status_code in {200, 503}, path
        assert not any(secret in seen.text for secret in SECRETS), path
    assert len(caplog.records) > 0
    assert [record.name for record in caplog.records if any(secret in record.getMessage() for secret in SECRETS)] == []
