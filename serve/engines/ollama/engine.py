"""The configured Ollama server as an engine, for the models that it has: through its own client, without Ray."""

import logging
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from datetime import UTC, datetime
from typing import Any

from cluster.errors import ForgearrError
from pipelines.training.models.versions import ModelNotFound
from serve.engines.collect import whole_of
from serve.engines.model_header import Header
from serve.engines.ollama.translate import Teller, request_to
from serve.engines.protocol import (
    Chunk,
    ContextExceeded,
    Embedded,
    EngineBusy,
    EngineFailed,
    EngineUnavailable,
    Held,
    Loading,
    Ranked,
    Remote,
    Request,
    RequestRefused,
    Source,
)

CONNECT_SECONDS = 5
ASK_SECONDS = 10
SILENCE_SECONDS = 900  # while a model is loaded, and while it reads

log = logging.getLogger(__name__)


class OllamaEngine:
    """Satisfies protocol.Engine."""

    def __init__(self, url: str | None) -> None:
        self._url = url

    async def models(self) -> list[Remote]:
        """All that it has."""
        if self._url is None:
            return []
        async with self._client(ASK_SECONDS) as client:
            listed = (await client.list()).models
        return [_remote(model) for model in listed if model.model]

    async def chat(self, reference: str, request: Request, source: Source = None) -> AsyncGenerator[list[Chunk]]:
        wanted = request_to(request)
        teller = Teller("prompt" in request)
        async with self._client() as client:
            ask: Any = client.generate if "prompt" in request else client.chat
            async with aclosing(await ask(model=reference, stream=True, **wanted)) as parts:
                async for part in parts:
                    if chunks := teller.chunks(part.model_dump()):
                        yield chunks

    async def complete(self, reference: str, request: Request, source: Source = None) -> dict[str, Any]:
        return await whole_of(self.chat(reference, request, source))

    async def embed(self, reference: str, texts: Sequence[str], source: Source = None) -> Embedded:
        async with self._client() as client:
            told = await client.embed(model=reference, input=texts, truncate=False)
        return Embedded([list(vector) for vector in told.embeddings], told.prompt_eval_count or 0)

    async def rank(self, reference: str, query: str, documents: Sequence[str], source: Source = None) -> Ranked:
        raise RequestRefused("Ollama's API ranks no texts.")

    async def describe(self, reference: str, source: Source = None) -> Header:
        async with self._client(ASK_SECONDS) as client:
            shown = await client.show(reference)
        facts = dict(shown.modelinfo or {})
        architecture = str(facts.get("general.architecture", ""))
        known = {name.removeprefix(f"{architecture}."): value for name, value in facts.items()}
        return Header(
            architecture=architecture,
            file_bytes=source.bytes if isinstance(source, Remote) else 0,
            context=known.get("context_length", 0),
            layers=known.get("block_count", 0),
            width=known.get("embedding_length", 0),
            key_values=0,
            vocabulary=0,
            parameters=facts.get("general.parameter_count", 0),
            template=shown.template or "",
            pools="embedding" in (shown.capabilities or []),
            ranks=False,
            gap=None,
        )

    async def load(self, reference: str, source: Source = None) -> str:
        async with self._client() as client:
            await client.generate(model=reference)
        return reference

    async def unload(self, reference: str, source: Source = None) -> bool:
        await self.keep(reference, 0, source)
        return True

    async def keep(self, reference: str, seconds: float | None, source: Source = None) -> None:
        async with self._client() as client:
            await client.generate(model=reference, keep_alive=-1 if seconds is None else seconds)

    async def loading(self) -> list[Loading]:
        return []  # it does not tell

    async def loaded(self) -> list[Held]:
        if self._url is None:
            return []
        try:
            async with self._client(ASK_SECONDS) as client:
                running = (await client.ps()).models
        except EngineUnavailable as error:
            log.warning("What is in the memory of Ollama cannot be said: %s", error.message)
            return []
        return [
            Held(model.model, int(model.size or 0), model.context_length or 0, 0, model.expires_at)
            for model in running
            if model.model
        ]

    @asynccontextmanager
    async def _client(self, silence: float = SILENCE_SECONDS) -> AsyncGenerator[Any]:
        import httpx
        import ollama

        if self._url is None:
            raise EngineUnavailable("No Ollama server is configured (ollama.url).")
        timeout = httpx.Timeout(silence, connect=CONNECT_SECONDS)
        with _our_errors(self._url):
            async with ollama.AsyncClient(host=self._url, timeout=timeout) as client:
                yield client


def _remote(model: Any) -> Remote:
    details = model.details
    return Remote(
        name=model.model,
        digest=model.digest or "",
        bytes=int(model.size or 0),
        base_model=(details and details.parent_model) or "",
        quantization=(details and details.quantization_level) or "unknown",
        created_at=model.modified_at or datetime.fromtimestamp(0, UTC),
    )


@contextmanager
def _our_errors(url: str) -> Generator[None]:
    """The one line of defence: what goes wrong there is one of our errors."""
    import httpx
    from ollama import ResponseError

    try:
        yield
    except (ConnectionError, httpx.HTTPError) as error:
        raise EngineUnavailable(f"The Ollama server at {url} does not answer ({type(error).__name__}).") from error
    except ResponseError as error:
        raise _refusal(str(error.error).rstrip("."), error.status_code) from error


def _refusal(said: str, status: int) -> ForgearrError:
    if status == 404:
        return ModelNotFound(f"Ollama says: {said}.")
    if status in {429, 503}:
        return EngineBusy(f"Ollama says: {said}.")
    if 400 <= status < 500:
        kind = ContextExceeded if "context length" in said else RequestRefused
        return kind(f"Ollama cannot take this request: {said}.")
    return EngineFailed(f"Ollama could not answer: {said}.")
