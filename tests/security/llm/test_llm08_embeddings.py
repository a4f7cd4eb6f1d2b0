"""LLM08, weaknesses of vectors and embeddings: what somebody wants of the routes that compute them."""

from typing import Any

import pytest

from serve.models.embed import MAX_TEXTS
from serve.openai.rerank import MAX_DOCUMENTS
from tests.security.llm.conftest import Say
from tests.support.api_client import ApiClient

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)

MODEL = "forgearr/tiny"
TOO_MANY: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"input": ["x"] * (MAX_TEXTS + 1)},
    "/api/embed": {"input": ["x"] * (MAX_TEXTS + 1)},
    "/v1/rerank": {"query": "x", "documents": ["x"] * (MAX_DOCUMENTS + 1)},
}
TOO_LONG: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"input": "x " * 100_000},
    "/v1/rerank": {"query": "x", "documents": ["x " * 100_000]},
}


@pytest.mark.parametrize("path", TOO_MANY)
async def test_occupy_an_engine_with_thousands_of_texts(api: ApiClient, say: Say, path: str) -> None:
    say("Yes.")
    refused = await api.request("ada", "POST", path, json={"model": MODEL, **TOO_MANY[path]})
    assert refused.status_code in {400, 422}
    assert "at most" in refused.text


@pytest.mark.parametrize("path", TOO_LONG)
async def test_occupy_an_engine_with_a_text_without_end(api: ApiClient, say: Say, path: str) -> None:
    say("Yes.")
    refused = await api.request("ada", "POST", path, json={"model": MODEL, **TOO_LONG[path]})
    assert refused.status_code == 400, refused.text
