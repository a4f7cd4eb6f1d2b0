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
from serve.engines.model_header import BATCH, Header, ModelUnreadable
from serve.engines.protocol import (
    Chunk,
    ContextExceeded,
    Embedded,
    EngineFailed,
    Ranked,
    Request,
    RequestRefused,
    TextTooLong,
)

CHECKPOINTS = 4
"""Of a slot whose cache cannot be cut back, as that of a sliding window: places from which it can go on."""
ERRORS_ONLY = 1
PACE_SECONDS = 0.025
"""Nobody sees words come faster than that."""
TOO_LONG = re.compile(r"input \((\d+) tokens\) is too large to process.*batch size: (\d+)")


@dataclass(frozen=True)
class Files:
    model: Path
    adapters: Mapping[str, Path] = field(default_factory=dict[str, Path])  # by the reference of their version
    template: str = ""  # of conversations, in Jinja; empty: the one in the file
    context: int | None = None  # tokens of a conversation; None: as the settings have it

    @property
    def bytes_of_adapters(self) -> int:
        return sum(path.stat().st_size for path in self.adapters.values())


class LoadedModel:
    """Made and closed in a thread of its own: both take a while."""

    def __init__(
        self, files: Files, header: Header, context: int, settings: EngineSettings, purpose: Purpose = "answers"
    ) -> None:
        self.adapters = list(files.adapters)
        self._gap, self._ranks = header.gap, header.ranks
        self._server = _start(files, header, context, settings, purpose)
        self._slots = asyncio.Semaphore(settings.slots)
        self._threads = ThreadPoolExecutor(settings.slots, thread_name_prefix="answer")

    async def answer(self, request: Request, reference: str) -> AsyncGenerator[list[Chunk]]:
        """Waits for a slot, then yields what the model says as it says it. The slot is free when it is closed."""
        async with self._slots:
            loop = asyncio.get_running_loop()
            spoken = _Spoken(loop)
            ask = self._server.handle_completions if "prompt" in request else self._server.handle_chat_completions
            body = self._body(request, reference)
            speaking = loop.run_in_executor(self._threads, _speak, ask, body, spoken)
            try:
                async for chunks in spoken:
                    yield chunks
            finally:
                spoken.stopped.set()
                await asyncio.shield(speaking)

    async def embed(self, texts: Sequence[str]) -> Embedded:
        """What the texts mean, as numbers. All of it is one piece of work."""
        async with self._slots:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, _embed, self._server, texts)

    async def rank(self, query: str, documents: Sequence[str]) -> Ranked:
        """How well the documents fit. All of it is one piece of work."""
        if not self._ranks:
            raise RequestRefused("The model was not made to rank texts: take a reranker, exported as GGUF.")
        async with self._slots:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, _rank, self._server, query, documents)

    def _body(self, request: Request, reference: str) -> bytes:
        try:
            return orjson.dumps({**self._with_gap(request), **STREAMED, **self._with(reference)})
        except orjson.JSONEncodeError as error:  # half of a letter, or what is nested too deeply
            raise RequestRefused(f"The model cannot take this request: {str(error).rstrip('.')}.") from error

    def _with_gap(self, request: Request) -> Request:
        """What shall be filled in between a prompt and its suffix, in the model's own signs for that."""
        if "suffix" not in request:
            return request
        if self._gap is None:
            raise RequestRefused("The model was not made to fill gaps, so it takes no suffix.")
        before, after, between = self._gap
        prompt = [before, request["prompt"], after, request["suffix"], between]
        return {**{name: value for name, value in request.items() if name != "suffix"}, "prompt": prompt}

    def _with(self, adapter: str) -> Request:
        """llama.cpp applies those adapters that a request gives a scale; all of them when it names none."""
        return {"lora": [{"id": number, "scale": float(name == adapter)} for number, name in enumerate(self.adapters)]}

    def close(self) -> None:
        """Give the memory back. Nobody may be waiting for an answer."""
        self._threads.shutdown()
        del self._server


STREAMED = {"stream": True, "stream_options": {"include_usage": True}, "return_progress": True}
"""Progress reports are what lets an answer be given up while the model still reads the question."""


class _Spoken:
    """What a model says: told by a thread, read by the event loop in batches of all that has come meanwhile.

    The first word passes at once, later ones at most every few milliseconds: passing words on, one by one, would take
    the processor from the model that makes them.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.stopped = threading.Event()
        self._loop = loop
        self._said = deque[Chunk | ForgearrError | None]()
        self._arrived, self._ended = asyncio.Event(), asyncio.Event()
        self._is_awaited = True

    def tell(self, data: bytes) -> bool:
        """Called by llama.cpp; it ends the answer when this is true."""
        chunk = orjson.loads(data)
        if "error" in chunk:
            self.put(_error(chunk["error"]))
        elif "prompt_progress" not in chunk:
            self.put(chunk)
        return self.stopped.is_set()

    def put(self, told: Chunk | ForgearrError | None) -> None:
        self._said.append(told)
        if told is None:
            self._loop.call_soon_threadsafe(self._ended.set)
        if told is None or self._is_awaited:
            self._loop.call_soon_threadsafe(self._arrived.set)

    async def __aiter__(self) -> AsyncGenerator[list[Chunk]]:
        while True:
            for one in await self._take():
                if isinstance(one, list):
                    yield one
                elif one is None:
                    return
                else:
                    raise one
            with suppress(TimeoutError):
                async with asyncio.timeout(PACE_SECONDS):
                    await self._ended.wait()

    async def _take(self) -> list[list[Chunk] | ForgearrError | None]:
        """All chunks that have come, and then perhaps the error or the end."""
        # In this order: whatever is put after the look at the list finds that it is awaited.
        self._arrived.clear()
        self._is_awaited = True
        if not self._said:
            await self._arrived.wait()
        self._is_awaited = False
        told = [self._said.popleft() for _ in range(len(self._said))]
        chunks = [part for one in told if isinstance(one, dict) for part in _told(one)]
        last = [one for one in told if not isinstance(one, dict)][:1]
        return [*([chunks] if chunks else []), *last]


def _speak(ask: Callable[[bytes, Callable[[bytes], bool]], None], body: bytes, spoken: _Spoken) -> None:
    """What cannot be read, or does not fit the model's template, is an exception; later errors are chunks."""
    try:
        ask(body, spoken.tell)
    except (ValueError, RuntimeError) as error:
        spoken.put(RequestRefused(f"The model cannot take this request: {str(error).strip().rstrip('.')}."))
    finally:
        spoken.put(None)


def _embed(server: Any, texts: Sequence[str]) -> Embedded:
    told = orjson.loads(server.handle_embeddings(orjson.dumps({"input": texts}).decode()))
    if "error" in told:
        raise _error(told["error"])
    return Embedded([one["embedding"] for one in told["data"]], told["usage"]["prompt_tokens"])


def _rank(server: Any, query: str, documents: Sequence[str]) -> Ranked:
    told = orjson.loads(server.handle_rerank(orjson.dumps({"query": query, "documents": documents}).decode()))
    if "error" in told:
        raise _error(told["error"])
    scores = {one["index"]: one["relevance_score"] for one in told["results"]}
    return Ranked([scores[index] for index in range(len(documents))], told["usage"]["total_tokens"])


def _told(chunk: Chunk) -> list[Chunk]:
    """Of a prompt that was gone on from, llama.cpp tells the end and the usage at once; else one after the other."""
    ended: Chunk = {name: chunk[name] for name in ("usage", "timings") if name in chunk}
    said: list[Chunk] = [{"choices": chunk["choices"]}] if chunk["choices"] else []
    return [*said, {"choices": [], **ended}] if ended else said


def _error(told: dict[str, Any]) -> ForgearrError:
    if told.get("type") == "exceed_context_size_error":
        return ContextExceeded(
            f"The conversation has {told['n_prompt_tokens']} tokens; the model takes {told['n_ctx']} with its answer."
        )
    if too_long := TOO_LONG.search(told["message"]):
        tokens, most = (int(number) for number in too_long.groups())
        return TextTooLong(
            f"A text has {tokens} tokens; the model takes {most}.", details={"tokens": tokens, "most": most}
        )
    if told.get("code") == 400:
        return RequestRefused(f"The model cannot take this request: {told['message'].rstrip('.')}.")
    return EngineFailed(f"The engine could not answer: {told['message'].rstrip('.')}.")


def _start(files: Files, header: Header, context: int, settings: EngineSettings, purpose: Purpose) -> Any:
    xllamacpp: Any = import_module("xllamacpp")  # it has no types
    parameters = xllamacpp.CommonParams()
    parameters.verbosity = ERRORS_ONLY
    parameters.model.path = str(files.model)
    parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path)) for path in files.adapters.values()]
    parameters.lora_init_without_apply = True
    parameters.n_parallel = settings.slots
    parameters.n_ctx = context * settings.slots
    parameters.n_batch = parameters.n_ubatch = BATCH
    if purpose == "embeddings":
        parameters.embedding = True
        parameters.n_batch = parameters.n_ubatch = context  # a text is read in one go
        if header.ranks:
            parameters.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_RANK
        elif not header.pools:
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
    parameters.n_ctx_checkpoints = CHECKPOINTS
    return _serve_nobody(xllamacpp, parameters, files)


def _serve_nobody(xllamacpp: Any, parameters: Any, files: Files) -> Any:
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
