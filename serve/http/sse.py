"""Server-sent events in OpenAI's format."""

from collections.abc import AsyncIterator

from fastapi.responses import StreamingResponse

from serve.http.errors import Responses


def sse_responses(kind: str) -> Responses:
    """The response in OpenAPI."""
    data = {"type": "string", "description": f"A {kind}, or [DONE]."}
    item = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return {200: {"content": {"text/event-stream": {"itemSchema": item}}}}


def sse_response(events: AsyncIterator[bytes]) -> StreamingResponse:
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


def event(data: bytes | memoryview) -> bytes:
    return b"data: " + data + b"\n\n"
