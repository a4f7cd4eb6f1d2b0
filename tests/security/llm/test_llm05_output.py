"""LLM05, improper handling of output: what a model says, or a name that somebody chose, wants of whoever shows it."""

import json

import pytest

from serve.http.marks import access_of
from serve.http.mounts import methods_of
from serve.routes import MOUNTS
from tests.security.llm.conftest import Say
from tests.support.api_client import ApiClient

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)

MODEL = "forgearr/tiny"
EVIL = '<script>alert("x")</script>\r\n\r\ndata: [DONE]\n\nevent: error\nid: 7\r\r</html>'
HELLO = [{"role": "user", "content": "Hello"}]
STREAMS = {
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/completions": {"prompt": "Hello\n"},
    "/v1/responses": {"input": "Hello"},
    "/api/chat": {"messages": HELLO},
    "/api/generate": {"prompt": "Hello"},
}
NAMES = [
    '"><script>alert(1)</script>.html',
    "a.txt\r\nSet-Cookie: a=b",
    'a.txt"; filename="b.exe',
    "../../etc/passwd",
    "größer ✓.jsonl",
]


@pytest.mark.parametrize("path", STREAMS)
async def test_forge_events_of_a_stream(api: ApiClient, say: Say, path: str) -> None:
    """What the model says stays inside of strings: each line of the stream is one that the server has made."""
    say(EVIL)
    response = await api.request("ada", "POST", path, json={"model": MODEL, "stream": True, **STREAMS[path]})
    kind = "application/x-ndjson" if path.startswith("/api/") else "text/event-stream"
    assert response.headers["content-type"].startswith(kind)
    lines = [line for line in response.content.split(b"\n") if line]
    documents = [line.removeprefix(b"data: ") for line in lines if not line.startswith(b"event: ")]
    assert documents.count(b"[DONE]") == (1 if path.endswith("completions") else 0)
    assert b"\r" not in response.content
    said = [text for line in documents if line != b"[DONE]" for text in texts_of(json.loads(line))]
    assert EVIL in "".join(said)
    assert not any(line.startswith((b"id: ", b"event: error")) for line in lines)


def texts_of(part: dict[str, object]) -> list[str]:
    """The text that one part of a stream adds."""
    match part:
        case {"choices": [{"delta": {"content": str(text)}}]} | {"choices": [{"text": str(text)}]}:
            return [text]
        case {"type": "response.output_text.delta", "delta": str(text)}:
            return [text]
        case {"message": {"content": str(text)}} | {"response": str(text)}:
            return [text]
        case _:
            return []


async def test_be_rendered_as_a_page_by_a_browser(api: ApiClient) -> None:
    """No browser guesses another type than the one that is sent, and no route sends a page."""
    paths = {
        route.path_format.replace("{", "").replace("}", "")
        for mount in MOUNTS
        for route in mount.routes
        if access_of(route) and hasattr(route, "path_format") and "GET" in methods_of(route)
    }
    assert len(paths) > 60
    for path in [*paths, "/<script>", "/api/v1/jobs/<script>"]:
        for username in ("admin", "ada"):
            response = await api.request(username, "GET", path)
            assert response.headers.get("x-content-type-options") == "nosniff", path
            assert "html" not in response.headers.get("content-type", ""), path


@pytest.mark.parametrize("name", NAMES)
async def test_have_a_file_opened_under_another_name_or_as_a_page(api: ApiClient, name: str) -> None:
    headers = {"Authorization": api.authorization("ada")}
    files, purpose = {"file": (name, b"<script>alert(1)</script>", "text/html")}, {"purpose": "user_data"}
    created = await api.http.post("/v1/files", files=files, data=purpose, headers=headers)
    assert created.status_code == 200, created.text
    content = await api.request("ada", "GET", f"/v1/files/{created.json()['id']}/content")
    (disposition,) = content.headers.get_list("content-disposition")
    kind, _, encoded = disposition.partition("; filename*=utf-8''")
    assert (kind, content.headers["content-type"]) == ("attachment", "application/octet-stream")
    assert encoded.isascii()
    assert not set(encoded) & set("\"'<>;\r\n\\ ")
    assert "set-cookie" not in content.headers
