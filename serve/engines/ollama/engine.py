"""The engine for models of the configured Ollama server. It calls the server with Ollama's client, without Ray."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from datetime import UTC, datetime
from typing import Any

from cluster.errors import ForgearrError
from pipelines.training.models.versions import ModelNotFound
from serve.engines.collect import collect
from serve.engines.model_header import Header
from serve.engines.ollama.translate import ChunkParser, to_ollama_request
from serve.engines.protocol import (
    Chunk,
    ContextExceeded,
    EmbeddingResult,
    EngineBusy,
    EngineFailed,
    EngineRequest,
    EngineUnavailable,
    LoadedModelInfo,
    LoadingModelInfo,
    OllamaModel,
    Ranking,
    RequestRefused,
    Source,
)

CONNECT_SECONDS = 5
QUERY_TIMEOUT_SECONDS = 10
READ_TIMEOUT_SECONDS = 900  # a server sends nothing while it loads a model or reads a prompt
MAX_MESSAGE_LENGTH = 1000

log = logging.getLogger(__name__)


class OllamaEngine:
    """Satisfies protocol.Engine."""

    def __init__(self, url: str | None) -> None:
        self._url = url

    async def models(self) -> list[OllamaModel]:
        if self._url is None:
            return []
        async with self._client(QUERY_TIMEOUT_SECONDS) as client:
            listed = (await client.list()).models
        return [_to_ollama_model(model) for model in listed if model.model]

    async def chat(
        self, reference: str, request: EngineRequest, source: Source = None, account: str = ""
    ) -> AsyncGenerator[list[Chunk]]:
        body = to_ollama_request(request)
        parser = ChunkParser("prompt" in request)
        async with self._client() as client:
            method: Any = client.generate if "prompt" in request else client.chat
            async with aclosing(await method(model=reference, stream=True, **body)) as parts:
                async for part in parts:
                    if chunks := parser.parse(part.model_dump()):
                        yield chunks

    async def complete(
        self, reference: str, request: EngineRequest, source: Source = None, account: str = ""
    ) -> dict[str, Any]:
        return await collect(self.chat(reference, request, source))

    async def embed(
        self, reference: str, texts: Sequence[str], source: Source = None, account: str = ""
    ) -> EmbeddingResult:
        async with self._client() as client:
            response = await client.embed(model=reference, input=texts, truncate=False)
        vectors = [list(vector) for vector in response.embeddings]
        if len(vectors) != len(texts):
            raise EngineFailed(f"The Ollama server sent {len(vectors)} embeddings for {len(texts)} texts.")
        return EmbeddingResult(vectors, response.prompt_eval_count or 0)

    async def rank(
        self, reference: str, query: str, documents: Sequence[str], source: Source = None, account: str = ""
    ) -> Ranking:
        raise RequestRefused("Models of the Ollama server cannot rank texts.")

    async def describe(self, reference: str, source: Source = None) -> Header:
        async with self._client(QUERY_TIMEOUT_SECONDS) as client:
            shown = await client.show(reference)
        fields = dict(shown.modelinfo or {})
        architecture = str(fields.get("general.architecture", ""))
        model_fields = {name.removeprefix(f"{architecture}."): value for name, value in fields.items()}
        return Header(
            architecture=architecture,
            file_bytes=source.bytes if isinstance(source, OllamaModel) else 0,
            context=_count(model_fields.get("context_length")),
            layers=_count(model_fields.get("block_count")),
            hidden_size=_count(model_fields.get("embedding_length")),
            kv_width=0,
            vocab_size=0,
            parameters=_count(fields.get("general.parameter_count")),
            template=shown.template or "",
            has_pooling="embedding" in (shown.capabilities or []),
            is_reranker=False,
            fim_tokens=None,
        )

    async def load(self, reference: str, source: Source = None) -> str:
        async with self._client() as client:
            await client.generate(model=reference)
        return reference

    async def unload(self, reference: str, source: Source = None) -> bool:
        await self.set_keep_alive(reference, 0, source)
        return True

    async def set_keep_alive(self, reference: str, seconds: float | None, source: Source = None) -> None:
        async with self._client() as client:
            await client.generate(model=reference, keep_alive=-1 if seconds is None else seconds)

    async def loading(self) -> list[LoadingModelInfo]:
        return []  # the server does not report it

    async def loaded(self) -> list[LoadedModelInfo]:
        if self._url is None:
            return []
        try:
            async with self._client(QUERY_TIMEOUT_SECONDS) as client:
                running = (await client.ps()).models
        except EngineUnavailable as error:
            log.warning("The loaded models of the Ollama server are unknown: %s", error.message)
            return []
        return [
            LoadedModelInfo(model.model, int(model.size or 0), model.context_length or 0, 0, model.expires_at)
            for model in running
            if model.model
        ]

    @asynccontextmanager
    async def _client(self, seconds: float | None = None) -> AsyncGenerator[Any]:
        """A client. `seconds` limits the whole time that it is used; without it, each wait for bytes is limited."""
        if self._url is None:
            raise EngineUnavailable("No Ollama server is configured (ollama.url).")
        with _translate_errors(self._url):
            async with asyncio.timeout(seconds), open_client(self._url, READ_TIMEOUT_SECONDS) as client:
                yield client


def open_client(url: str, read_seconds: float) -> Any:
    """Ollama's client, with limits for what the server sends."""
    import httpx
    import ollama

    from serve.engines.ollama.transport import BoundedTransport

    timeout = httpx.Timeout(read_seconds, connect=CONNECT_SECONDS)
    return ollama.AsyncClient(host=url, timeout=timeout, follow_redirects=False, transport=BoundedTransport())


def _to_ollama_model(model: Any) -> OllamaModel:
    details = model.details
    return OllamaModel(
        name=model.model,
        digest=model.digest or "",
        bytes=int(model.size or 0),
        base_model=(details and details.parent_model) or "",
        quantization=(details and details.quantization_level) or "unknown",
        created_at=model.modified_at or datetime.fromtimestamp(0, UTC),
    )


def _count(value: object) -> int:
    """A number that the server reports. Anything else counts as not known."""
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


@contextmanager
def _translate_errors(url: str) -> Generator[None]:
    """Translate the errors of the client and of the server into Forgearr's."""
    import httpx
    from ollama import ResponseError

    try:
        yield
    except (ConnectionError, TimeoutError, httpx.HTTPError) as error:
        raise EngineUnavailable(f"The Ollama server at {url} does not answer ({type(error).__name__}).") from error
    except ResponseError as error:
        raise _to_forgearr_error(str(error.error)[:MAX_MESSAGE_LENGTH].rstrip("."), error.status_code) from error
    except (ValueError, TypeError, AttributeError, LookupError) as error:  # the client does not check types
        raise EngineUnavailable(f"The program at {url} does not answer as an Ollama server does.") from error


def _to_forgearr_error(message: str, status: int) -> ForgearrError:
    if status == 404:
        return ModelNotFound(f"Ollama says: {message}.")
    if status in {429, 503}:
        return EngineBusy(f"Ollama says: {message}.")
    if 400 <= status < 500:
        error_class = ContextExceeded if "context length" in message else RequestRefused
        return error_class(f"Ollama cannot process this request: {message}.")
    return EngineFailed(f"Ollama could not answer: {message}.")
