"""The way to an Ollama server, for Ollama's client: no redirects, no compression, and no response without end."""

from collections.abc import AsyncIterator

import httpx

from serve.engines.protocol import EngineUnavailable

MAX_BYTES = 64 * 1024 * 1024
"""Of one response. A stream has some 150 bytes for a token."""


class BoundedTransport(httpx.AsyncHTTPTransport):
    """Refuses what an Ollama server never sends. Ollama's client would follow it to any host, and load all of it."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        # A compressed response could be of any size.
        request.headers["Accept-Encoding"] = "identity"
        response = await super().handle_async_request(request)
        refusal = _refusal(request, response)
        if refusal is not None:
            await response.aclose()
            raise EngineUnavailable(refusal)
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _BoundedStream(response.stream)
        return response


def _refusal(request: httpx.Request, response: httpx.Response) -> str | None:
    if response.has_redirect_location:
        target = request.url.join(response.headers["location"])
        return (
            f"The Ollama server redirects to {target.scheme}://{target.host}; if that is correct, set it as ollama.url."
        )
    if response.headers.get("content-encoding", "identity") != "identity":
        return "The Ollama server sent a compressed response, for which it was not asked."
    return None


class _BoundedStream(httpx.AsyncByteStream):
    def __init__(self, stream: httpx.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        received = 0
        async for chunk in self._stream:
            received += len(chunk)
            if received > MAX_BYTES:
                raise EngineUnavailable(f"The Ollama server sent more than {MAX_BYTES // 1024 // 1024} MiB.")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()
