"""Runs one model with transformers, whose continuous batching answers all requests together.

A thread of transformers runs step after step. Each step generates one token for every request of the batch. Requests
join and leave the batch between steps. The event loop turns tokens into text.
"""

import asyncio
import gc
import os
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from secrets import token_hex
from threading import Thread
from time import monotonic, perf_counter
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from cluster.settings import EngineSettings
from serve.engines.local.pool import Purpose
from serve.engines.local.slots import FairSlots
from serve.engines.model_header import ModelUnreadable
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
from serve.engines.transformers.loading import load_model, start_batching, tokenizer_folder
from serve.engines.transformers.memory import TransformersFiles
from serve.engines.transformers.request_stream import RequestStream, tools_of
from serve.engines.transformers.sampling import Sampler, Sampling
from serve.engines.transformers.text_stream import TOOL_CALL_START

# By default torch's threads spin while they wait, and take processor time from other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

SUPPORTED_FIELDS = {
    "messages",
    "prompt",
    "max_tokens",
    "stop",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "chat_template_kwargs",
    "logprobs",
    "top_logprobs",
}
SAMPLING_FIELDS = {"temperature", "top_k", "top_p", "min_p", "seed", "frequency_penalty", "presence_penalty"}


class TransformersModel:
    """Construct and close it in a thread: both are slow."""

    adapters = ()  # an adapter is merged into the model

    def __init__(
        self,
        files: TransformersFiles,
        context: int,
        settings: EngineSettings,
        purpose: Purpose,
    ) -> None:
        torch.set_num_threads(settings.threads or os.cpu_count() or 1)
        disable_progress_bar()
        self._context = context
        self._slots, self._embedding = FairSlots(settings.slots), FairSlots(1)
        self._start_lock = asyncio.Lock()
        self._sampler = Sampler()
        self._rendering_since: list[float] = []  # one for each chat template that runs now
        self._manager: Any = None  # of continuous batching; None for embeddings
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_folder(files))
            self._model = load_model(files, settings)
            if purpose == "answers":
                self._manager = start_batching(self._model, self._sampler, context, settings)
                self._start()
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise ModelUnreadable(f"transformers cannot load this model: {_first_line(error)}") from error

    @property
    def silent_seconds(self) -> float:
        return max((monotonic() - started_at for started_at in self._rendering_since), default=0)

    async def answer(self, request: EngineRequest, reference: str, account: str) -> AsyncGenerator[list[Chunk]]:
        """Wait for a slot, then stream a completion. Closing the stream takes the request out of the batch."""
        async with self._slots.take(account), aclosing(self._answer(request)) as stream:
            async for chunks in stream:
                yield chunks

    async def _answer(self, request: EngineRequest) -> AsyncGenerator[list[Chunk]]:
        started_at = perf_counter()
        tokens = await asyncio.to_thread(self._prompt_tokens, request)
        available = self._context - len(tokens)
        max_tokens = min(request.get("max_tokens", available), available)
        sampling = _parse_sampling(request)
        stream = RequestStream(request, self._tokenizer, sampling)
        eos_tokens, first_token_at = self._eos_tokens(), None
        generated = self._generate(tokens, max_tokens, sampling, eos_tokens) if max_tokens else _no_tokens()
        finish_reason, count = "length", 0
        async with aclosing(generated):
            async for token in generated:
                first_token_at = first_token_at or perf_counter()
                count += 1
                if token in eos_tokens:
                    finish_reason = "stop"
                elif chunks := stream.feed(token):
                    yield chunks
                if stream.stopped:
                    finish_reason = "stop"
                    break
        usage = {"prompt_tokens": len(tokens), "completion_tokens": count, "total_tokens": len(tokens) + count}
        ended_at = perf_counter()
        timings = {
            "prompt_ms": ((first_token_at or ended_at) - started_at) * 1000,
            "predicted_ms": (ended_at - (first_token_at or ended_at)) * 1000,
        }
        yield [*stream.end(finish_reason), {"choices": [], "usage": usage, "timings": timings}]

    async def embed(self, texts: Sequence[str], account: str) -> EmbeddingResult:
        """The mean of the last layer's hidden states of each text, normalized to length 1."""
        async with self._embedding.take(account):
            return await asyncio.to_thread(self._embed, texts)

    async def rank(self, query: str, documents: Sequence[str], account: str) -> Ranking:
        raise RequestRefused("Only a reranker in GGUF can rank texts. Export this model as GGUF.")

    def close(self) -> None:
        if self._manager is not None:
            self._manager.stop(hard_stop=True)
            self._manager.destroy()
        del self._manager, self._model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _start(self) -> None:
        """Start the thread of transformers, also after a failed step, whose requests have failed with it.

        It is started from a daemon thread, because it inherits that, and must not keep the process alive.
        """
        self._manager.join(perf_counter())
        starting = Thread(target=self._manager.start, daemon=True)
        starting.start()
        starting.join()

    async def _generate(
        self, tokens: list[int], max_tokens: int, sampling: Sampling, eos_tokens: set[int]
    ) -> AsyncGenerator[int]:
        manager = self._manager
        async with self._start_lock:
            if manager.background_thread_status.can_accept_new_requests() is not None:
                await asyncio.to_thread(self._start)
        identifier = token_hex(12)
        results = asyncio.Queue[Any]()
        self._sampler.by_request_id[identifier] = sampling
        manager.register_result_handler(identifier, results.put_nowait)
        yielded, result = 0, None
        try:
            added = manager.add_request(
                tokens, request_id=identifier, max_new_tokens=max_tokens, streaming=True, eos_token_id=list(eos_tokens)
            )
            if added is None:
                raise EngineFailed("The engine could not answer: it has stopped.")
            while result is None or not result.is_finished():
                result = await results.get()
                if result.error is not None:
                    raise EngineFailed(f"The engine could not answer: {result.error.splitlines()[0].rstrip('.')}.")
                for token in result.generated_tokens[yielded:]:
                    yielded += 1
                    yield token
        finally:
            if result is None or not result.is_finished():
                manager.cancel_request(identifier)
            manager.output_router.result_handlers.pop(identifier, None)
            while not manager.output_router.output_queue.empty():  # tokens of requests that were cancelled
                manager.output_router.output_queue.get_nowait()
            self._sampler.by_request_id.pop(identifier, None)

    def _prompt_tokens(self, request: EngineRequest) -> list[int]:
        tokens = self._tokenize(request["prompt"]) if "prompt" in request else self._apply_chat_template(request)
        if not tokens:
            raise RequestRefused("The model cannot process this request: the prompt is empty.")
        if len(tokens) >= self._context:
            raise ContextExceeded(
                f"The conversation has {len(tokens)} tokens; with the answer, the model allows {self._context}."
            )
        return tokens

    def _tokenize(self, text: str) -> list[int]:
        return self._tokenizer(text)["input_ids"]

    def _apply_chat_template(self, request: EngineRequest) -> list[int]:
        template = self._tokenizer.chat_template
        if not template:
            raise RequestRefused("This model has no chat template; it can only complete a prompt.")
        tools = tools_of(request)
        if tools and TOOL_CALL_START not in str(template):
            raise RequestRefused(
                f"This model supports no tools here: its template does not write tool calls as {TOOL_CALL_START}."
            )
        try:
            with self._rendering():
                return self._tokenizer.apply_chat_template(
                    request["messages"],
                    tools=tools or None,
                    add_generation_prompt=True,
                    return_dict=False,
                    **request.get("chat_template_kwargs", {}),
                )
        except (TemplateError, TypeError, ValueError) as error:
            raise RequestRefused(f"The messages do not fit the model's template: {_first_line(error)}") from error

    @contextmanager
    def _rendering(self) -> Generator[None]:
        started_at = monotonic()
        self._rendering_since.append(started_at)
        try:
            yield
        finally:
            self._rendering_since.remove(started_at)

    def _eos_tokens(self) -> set[int]:
        """Those of the model and of the tokenizer, which may differ."""
        eos_ids = [self._model.generation_config.eos_token_id, self._tokenizer.eos_token_id]
        return {
            token
            for eos_id in eos_ids
            if eos_id is not None
            for token in (eos_id if isinstance(eos_id, list) else [eos_id])
        }

    @torch.inference_mode()
    def _embed(self, texts: Sequence[str]) -> EmbeddingResult:
        vectors: list[list[float]] = []
        count = 0
        for text in texts:
            tokens = self._tokenize(text)
            if len(tokens) > self._context:
                raise TextTooLong(
                    f"A text has {len(tokens)} tokens; the model allows {self._context}.",
                    details={"tokens": len(tokens), "most": self._context},
                )
            if not tokens:
                raise RequestRefused("The model cannot process this request: a text is empty.")
            hidden = self._model.base_model(torch.tensor([tokens], device=self._model.device)).last_hidden_state
            mean = hidden[0].float().mean(0)
            vectors.append((mean / mean.norm().clamp_min(1e-12)).tolist())
            count += len(tokens)
        return EmbeddingResult(vectors, count)


def _parse_sampling(request: EngineRequest) -> Sampling:
    supported = SUPPORTED_FIELDS | SAMPLING_FIELDS | {"logit_bias"}
    extra = {name for name in request if name not in supported and not _is_default_value(name, request[name])}
    if extra:
        raise RequestRefused(
            f"This model runs on transformers, which does not support {', '.join(sorted(extra))}. Leave it out, or "
            "export the model as GGUF."
        )
    options: dict[str, Any] = {name: request[name] for name in SAMPLING_FIELDS if name in request}
    options["logit_bias"] = dict(request.get("logit_bias", []))
    logprobs = request.get("logprobs")
    if isinstance(logprobs, bool):
        options["top_logprobs"] = request.get("top_logprobs", 0) if logprobs else None
    else:  # for a prompt, it is the number of tokens to report
        options["top_logprobs"] = logprobs
    return Sampling(**options)


def _is_default_value(name: str, value: Any) -> bool:
    """Some clients send defaults, which have no effect."""
    defaults: Mapping[str, Any] = {
        "response_format": {"type": "text"},
        "repeat_penalty": 1,
        "typical_p": 1,
        "mirostat": 0,
    }
    return name in defaults and value == defaults[name]


async def _no_tokens() -> AsyncGenerator[int]:
    for token in ():
        yield token


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".") + "."
