"""Runs one GGUF model in this process, with llama.cpp's server (xllamacpp).

A thread of llama.cpp generates a completion, and a thread of ours waits for it. The event loop only forwards chunks.
"""

import asyncio
import os
import re
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import orjson

from cluster.errors import ForgearrError
from cluster.settings import EngineSettings
from serve.engines.local.pool import Purpose
from serve.engines.local.slots import FairSlots
from serve.engines.model_header import BATCH_TOKENS, Header, ModelUnreadable
from serve.engines.protocol import (
    Chunk,
    ContextExceeded,
    EmbeddingResult,
    EngineFailed,
    EngineRequest,
    Ranking,
    RequestRefused,
    TextTooLong,
)

CONTEXT_CHECKPOINTS = 4
"""Per slot: positions to continue from, where the cache cannot be truncated, as with a sliding window."""
VERBOSITY_ERRORS = 1
FLUSH_SECONDS = 0.025
"""Readers notice no shorter interval."""
TOO_LONG_ERROR = re.compile(r"input \((\d+) tokens\) is too large to process.*batch size: (\d+)")


@dataclass(frozen=True)
class GgufModelFiles:
    model: Path
    adapters: Mapping[str, Path] = field(default_factory=dict[str, Path])  # by reference
    template: str = ""  # of chats, in Jinja; empty: the one in the file
    context: int | None = None  # tokens; None: engines.context

    @property
    def adapter_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.adapters.values())


class LlamaCppModel:
    """Construct and close it in a thread: both are slow."""

    def __init__(
        self,
        files: GgufModelFiles,
        header: Header,
        context: int,
        settings: EngineSettings,
        purpose: Purpose = "answers",
    ) -> None:
        self.adapters = list(files.adapters)
        self._fim_tokens, self._is_reranker = header.fim_tokens, header.is_reranker
        self._server = _start_server(files, header, context, settings, purpose)
        self._slots = FairSlots(settings.slots)
        self._threads = ThreadPoolExecutor(settings.slots, thread_name_prefix="answer")
        self._running = set[_ChunkQueue]()

    @property
    def silent_seconds(self) -> float:
        return max((monotonic() - chunk_queue.last_sign_at for chunk_queue in self._running), default=0)

    async def answer(self, request: EngineRequest, reference: str, account: str) -> AsyncGenerator[list[Chunk]]:
        """Wait for a slot, then stream a completion. Closing the stream frees the slot."""
        async with self._slots.take(account):
            loop = asyncio.get_running_loop()
            chunk_queue = _ChunkQueue(loop)
            handler = self._server.handle_completions if "prompt" in request else self._server.handle_chat_completions
            body = self._body(request, reference)
            generation = loop.run_in_executor(self._threads, _run_handler, handler, body, chunk_queue)
            self._running.add(chunk_queue)
            generation.add_done_callback(lambda _: self._running.discard(chunk_queue))
            try:
                async for chunks in chunk_queue:
                    yield chunks
            finally:
                chunk_queue.stopped.set()
                await asyncio.shield(generation)

    async def embed(self, texts: Sequence[str], account: str) -> EmbeddingResult:
        """Create an embedding of each text. All of them take one slot together."""
        async with self._slots.take(account):
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, _embed, self._server, texts)

    async def rank(self, query: str, documents: Sequence[str], account: str) -> Ranking:
        """Score how well each document fits the query. All of them take one slot together."""
        if not self._is_reranker:
            raise RequestRefused("This model cannot rank texts. Use a reranker that was exported as GGUF.")
        async with self._slots.take(account):
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, _rank, self._server, query, documents)

    def _body(self, request: EngineRequest, reference: str) -> bytes:
        try:
            return orjson.dumps({**self._with_infill(request), **STREAM_OPTIONS, **self._adapter_scales(reference)})
        except orjson.JSONEncodeError as error:  # a lone surrogate, or too deep nesting
            raise RequestRefused(f"The model cannot process this request: {str(error).rstrip('.')}.") from error

    def _with_infill(self, request: EngineRequest) -> EngineRequest:
        """Encode the prompt and its suffix with the model's tokens for fill in the middle."""
        if "suffix" not in request:
            return request
        if self._fim_tokens is None:
            raise RequestRefused("This model does not support suffix: it has no tokens for fill in the middle.")
        prefix, suffix, middle = self._fim_tokens
        prompt = [prefix, request["prompt"], suffix, request["suffix"], middle]
        return {**{name: value for name, value in request.items() if name != "suffix"}, "prompt": prompt}

    def _adapter_scales(self, adapter: str) -> EngineRequest:
        """Apply one adapter only. llama.cpp would apply all of them to a request without scales."""
        return {"lora": [{"id": number, "scale": float(name == adapter)} for number, name in enumerate(self.adapters)]}

    def close(self) -> None:
        """Free the memory. No request may be in progress."""
        self._threads.shutdown()
        del self._server


STREAM_OPTIONS = {"stream": True, "stream_options": {"include_usage": True}, "return_progress": True}
"""Progress reports are the only chance to stop a request while the model still reads its prompt."""


class _ChunkQueue:
    """Forwards chunks from a thread of llama.cpp to the event loop, in batches.

    The first chunk is forwarded at once, later ones every FLUSH_SECONDS. To wake the event loop for each token would
    take processor time from the model.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.stopped = threading.Event()
        self.last_sign_at = monotonic()  # of progress, from llama.cpp
        self._loop = loop
        self._items = deque[Chunk | ForgearrError | None]()
        self._arrived, self._ended = asyncio.Event(), asyncio.Event()
        self._has_waiter = True

    def on_data(self, data: bytes) -> bool:
        """Called by llama.cpp, which stops the completion if this returns true."""
        self.last_sign_at = monotonic()
        chunk = orjson.loads(data)
        if "error" in chunk:
            self.put(_error(chunk["error"]))
        elif "prompt_progress" not in chunk:
            self.put(chunk)
        return self.stopped.is_set()

    def put(self, item: Chunk | ForgearrError | None) -> None:
        self._items.append(item)
        if item is None:
            self._loop.call_soon_threadsafe(self._ended.set)
        if item is None or self._has_waiter:
            self._loop.call_soon_threadsafe(self._arrived.set)

    async def __aiter__(self) -> AsyncGenerator[list[Chunk]]:
        while True:
            for item in await self._take():
                if isinstance(item, list):
                    yield item
                elif item is None:
                    return
                else:
                    raise item
            with suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_SECONDS):
                    await self._ended.wait()

    async def _take(self) -> list[list[Chunk] | ForgearrError | None]:
        """All chunks that have arrived as one item, then the error or the end if there is one."""
        # In this order: an item that is put after the queue was found empty sees that it is awaited.
        self._arrived.clear()
        self._has_waiter = True
        if not self._items:
            await self._arrived.wait()
        self._has_waiter = False
        items = [self._items.popleft() for _ in range(len(self._items))]
        chunks = [chunk for item in items if isinstance(item, dict) for chunk in _split_usage(item)]
        last = [item for item in items if not isinstance(item, dict)][:1]
        return [*([chunks] if chunks else []), *last]


def _run_handler(
    handler: Callable[[bytes, Callable[[bytes], bool]], None], body: bytes, chunk_queue: _ChunkQueue
) -> None:
    """llama.cpp raises if it cannot parse the request or apply the template. It sends later errors as data."""
    try:
        handler(body, chunk_queue.on_data)
    except (ValueError, RuntimeError) as error:
        chunk_queue.put(RequestRefused(f"The model cannot process this request: {str(error).strip().rstrip('.')}."))
    finally:
        chunk_queue.put(None)


def _embed(server: Any, texts: Sequence[str]) -> EmbeddingResult:
    result = orjson.loads(server.handle_embeddings(orjson.dumps({"input": texts}).decode()))
    if "error" in result:
        raise _error(result["error"])
    return EmbeddingResult([item["embedding"] for item in result["data"]], result["usage"]["prompt_tokens"])


def _rank(server: Any, query: str, documents: Sequence[str]) -> Ranking:
    result = orjson.loads(server.handle_rerank(orjson.dumps({"query": query, "documents": documents}).decode()))
    if "error" in result:
        raise _error(result["error"])
    scores = {item["index"]: item["relevance_score"] for item in result["results"]}
    return Ranking([scores[index] for index in range(len(documents))], result["usage"]["total_tokens"])


def _split_usage(chunk: Chunk) -> list[Chunk]:
    """Split the last chunk of a prompt's completion. llama.cpp sends a chat's end and its usage in separate chunks."""
    stats: Chunk = {name: chunk[name] for name in ("usage", "timings") if name in chunk}
    chunks: list[Chunk] = [{"choices": chunk["choices"]}] if chunk["choices"] else []
    return [*chunks, {"choices": [], **stats}] if stats else chunks


def _error(error: dict[str, Any]) -> ForgearrError:
    if error.get("type") == "exceed_context_size_error":
        return ContextExceeded(
            f"The conversation has {error['n_prompt_tokens']} tokens; with the answer, the model allows "
            f"{error['n_ctx']}."
        )
    if too_long := TOO_LONG_ERROR.search(error["message"]):
        tokens, limit = (int(number) for number in too_long.groups())
        return TextTooLong(
            f"A text has {tokens} tokens; the model allows {limit}.", details={"tokens": tokens, "most": limit}
        )
    if error.get("code") == 400:
        return RequestRefused(f"The model cannot process this request: {error['message'].rstrip('.')}.")
    return EngineFailed(f"The engine could not answer: {error['message'].rstrip('.')}.")


def _start_server(
    files: GgufModelFiles, header: Header, context: int, settings: EngineSettings, purpose: Purpose
) -> Any:
    xllamacpp: Any = import_module("xllamacpp")  # it has no types
    parameters = xllamacpp.CommonParams()
    parameters.verbosity = VERBOSITY_ERRORS
    parameters.model.path = str(files.model)
    parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path)) for path in files.adapters.values()]
    parameters.lora_init_without_apply = True
    parameters.n_parallel = settings.slots
    parameters.n_ctx = context * settings.slots
    parameters.n_batch = parameters.n_ubatch = BATCH_TOKENS
    if purpose == "embeddings":
        parameters.embedding = True
        parameters.n_batch = parameters.n_ubatch = context  # a text is processed in one batch
        if header.is_reranker:
            parameters.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_RANK
        elif not header.has_pooling:
            parameters.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    parameters.chat_template = files.template
    parameters.n_gpu_layers = settings.gpu_layers
    parameters.fit_params = settings.gpu_layers == -1 and _has_gpu(xllamacpp)
    if settings.threads is not None:
        parameters.cpuparams.n_threads = settings.threads
    # As OpenAI does: a message of the assistant is not continued, but answered.
    parameters.prefill_assistant = False
    # This cache is not part of the computed memory.
    parameters.cache_ram_mib = 0
    parameters.n_ctx_checkpoints = CONTEXT_CHECKPOINTS
    return _start_without_http(xllamacpp, parameters, files)


def _start_without_http(xllamacpp: Any, parameters: Any, files: GgufModelFiles) -> Any:
    """llama.cpp's server always opens an HTTP socket. It gets a random key, and a file that is deleted at once."""
    parameters.api_keys = [token_hex(32)]
    parameters.ui = parameters.endpoint_slots = False
    parameters.n_threads_http = 1
    parameters.endpoint_metrics = True
    with TemporaryDirectory(prefix="forgearr-", ignore_cleanup_errors=True) as folder:
        parameters.hostnames = [os.path.join(folder, "model.sock")]  # noqa: PTH118
        try:
            server = xllamacpp.Server(parameters)
        except RuntimeError as error:
            names = " and ".join(path.name for path in (files.model, *files.adapters.values()))
            raise ModelUnreadable(
                f"llama.cpp cannot load {names}. The reason is in the log of the engine's process."
            ) from error
    # Wait until it runs: to delete a server that has not started is a deadlock.
    server.handle_metrics()
    return server


def _has_gpu(xllamacpp: Any) -> bool:
    return any("GPU" in str(device["type"]) for device in xllamacpp.get_device_info())
