"""One GGUF model in memory, run by llama.cpp's own server in this process (xllamacpp).

An answer is made in a thread of llama.cpp's and one of ours, which waits for it. The event loop only passes chunks on.
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
from typing import Any

import orjson

from cluster.errors import ForgearrError
from cluster.settings import EngineSettings
from serve.engines.local.pool import Purpose
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
"""Of a slot whose cache cannot be cut back, as that of a sliding window: places from which it can go on."""
VERBOSITY_ERRORS = 1
FLUSH_SECONDS = 0.025
"""Nobody sees words come faster than that."""
TOO_LONG_ERROR = re.compile(r"input \((\d+) tokens\) is too large to process.*batch size: (\d+)")


@dataclass(frozen=True)
class GgufModelFiles:
    model: Path
    adapters: Mapping[str, Path] = field(default_factory=dict[str, Path])  # by the reference of their version
    template: str = ""  # of conversations, in Jinja; empty: the one in the file
    context: int | None = None  # tokens of a conversation; None: as the settings have it

    @property
    def adapter_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.adapters.values())


class LlamaCppModel:
    """Made and closed in a thread of its own: both take a while."""

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
        self._slots = asyncio.Semaphore(settings.slots)
        self._threads = ThreadPoolExecutor(settings.slots, thread_name_prefix="answer")

    async def answer(self, request: EngineRequest, reference: str) -> AsyncGenerator[list[Chunk]]:
        """Waits for a slot, then yields what the model says as it says it. The slot is free when it is closed."""
        async with self._slots:
            loop = asyncio.get_running_loop()
            chunk_queue = _ChunkQueue(loop)
            handler = self._server.handle_completions if "prompt" in request else self._server.handle_chat_completions
            body = self._body(request, reference)
            generation = loop.run_in_executor(self._threads, _run_handler, handler, body, chunk_queue)
            try:
                async for chunks in chunk_queue:
                    yield chunks
            finally:
                chunk_queue.stopped.set()
                await asyncio.shield(generation)

    async def embed(self, texts: Sequence[str]) -> EmbeddingResult:
        """What the texts mean, as numbers. All of it is one piece of work."""
        async with self._slots:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, _embed, self._server, texts)

    async def rank(self, query: str, documents: Sequence[str]) -> Ranking:
        """How well the documents fit. All of it is one piece of work."""
        if not self._is_reranker:
            raise RequestRefused("The model was not made to rank texts: take a reranker, exported as GGUF.")
        async with self._slots:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, _rank, self._server, query, documents)

    def _body(self, request: EngineRequest, reference: str) -> bytes:
        try:
            return orjson.dumps({**self._with_infill(request), **STREAM_OPTIONS, **self._adapter_scales(reference)})
        except orjson.JSONEncodeError as error:  # half of a letter, or what is nested too deeply
            raise RequestRefused(f"The model cannot take this request: {str(error).rstrip('.')}.") from error

    def _with_infill(self, request: EngineRequest) -> EngineRequest:
        """What shall be filled in between a prompt and its suffix, in the model's own signs for that."""
        if "suffix" not in request:
            return request
        if self._fim_tokens is None:
            raise RequestRefused("The model was not made to fill gaps, so it takes no suffix.")
        prefix, suffix, middle = self._fim_tokens
        prompt = [prefix, request["prompt"], suffix, request["suffix"], middle]
        return {**{name: value for name, value in request.items() if name != "suffix"}, "prompt": prompt}

    def _adapter_scales(self, adapter: str) -> EngineRequest:
        """llama.cpp applies those adapters that a request gives a scale; all of them when it names none."""
        return {"lora": [{"id": number, "scale": float(name == adapter)} for number, name in enumerate(self.adapters)]}

    def close(self) -> None:
        """Give the memory back. Nobody may be waiting for an answer."""
        self._threads.shutdown()
        del self._server


STREAM_OPTIONS = {"stream": True, "stream_options": {"include_usage": True}, "return_progress": True}
"""Progress reports are what lets an answer be given up while the model still reads the question."""


class _ChunkQueue:
    """What a model says: told by a thread, read by the event loop in batches of all that has come meanwhile.

    The first word passes at once, later ones at most every few milliseconds: passing words on, one by one, would take
    the processor from the model that makes them.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.stopped = threading.Event()
        self._loop = loop
        self._items = deque[Chunk | ForgearrError | None]()
        self._arrived, self._ended = asyncio.Event(), asyncio.Event()
        self._has_waiter = True

    def on_data(self, data: bytes) -> bool:
        """Called by llama.cpp; it ends the answer when this is true."""
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
        """All chunks that have come, and then perhaps the error or the end."""
        # In this order: whatever is put after the look at the list finds that it is awaited.
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
    """What cannot be read, or does not fit the model's template, is an exception; later errors are chunks."""
    try:
        handler(body, chunk_queue.on_data)
    except (ValueError, RuntimeError) as error:
        chunk_queue.put(RequestRefused(f"The model cannot take this request: {str(error).strip().rstrip('.')}."))
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
    """Of a prompt that was gone on from, llama.cpp tells the end and the usage at once; else one after the other."""
    stats: Chunk = {name: chunk[name] for name in ("usage", "timings") if name in chunk}
    chunks: list[Chunk] = [{"choices": chunk["choices"]}] if chunk["choices"] else []
    return [*chunks, {"choices": [], **stats}] if stats else chunks


def _error(error: dict[str, Any]) -> ForgearrError:
    if error.get("type") == "exceed_context_size_error":
        return ContextExceeded(
            f"The conversation has {error['n_prompt_tokens']} tokens; the model takes {error['n_ctx']} with its answer."
        )
    if too_long := TOO_LONG_ERROR.search(error["message"]):
        tokens, limit = (int(number) for number in too_long.groups())
        return TextTooLong(
            f"A text has {tokens} tokens; the model takes {limit}.", details={"tokens": tokens, "most": limit}
        )
    if error.get("code") == 400:
        return RequestRefused(f"The model cannot take this request: {error['message'].rstrip('.')}.")
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
        parameters.n_batch = parameters.n_ubatch = context  # a text is read in one go
        if header.is_reranker:
            parameters.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_RANK
        elif not header.has_pooling:
            parameters.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    parameters.chat_template = files.template
    parameters.n_gpu_layers = settings.gpu_layers
    parameters.fit_params = settings.gpu_layers == -1 and _has_gpu(xllamacpp)
    if settings.threads is not None:
        parameters.cpuparams.n_threads = settings.threads
    # As OpenAI does it: an answer begins anew, even after a message of the assistant's.
    parameters.prefill_assistant = False
    # It would take memory that nobody counts.
    parameters.cache_ram_mib = 0
    parameters.n_ctx_checkpoints = CONTEXT_CHECKPOINTS
    return _start_without_http(xllamacpp, parameters, files)


def _start_without_http(xllamacpp: Any, parameters: Any, files: GgufModelFiles) -> Any:
    """llama.cpp's server cannot do without its own HTTP door: it gets one that is locked, and taken away at once."""
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
                f"llama.cpp cannot load {names}; what it says of that is in the log of the engine's process."
            ) from error
    # It runs when it answers. One that is let go before that would wait for itself for ever.
    server.handle_metrics()
    return server


def _has_gpu(xllamacpp: Any) -> bool:
    return any("GPU" in str(device["type"]) for device in xllamacpp.get_device_info())
