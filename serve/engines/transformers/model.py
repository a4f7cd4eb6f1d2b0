"""One model in memory, run by transformers, which answers all its requests together (its continuous batching).

A thread of transformers' makes step after step, each with a token for every request of the batch; requests join and
leave between two steps. The event loop turns tokens into text.
"""

import asyncio
import gc
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from secrets import token_hex
from threading import Thread
from time import perf_counter
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import (
    AutoTokenizer,
)
from transformers.utils.logging import disable_progress_bar

from cluster.settings import EngineSettings
from serve.engines.local.pool import Purpose
from serve.engines.model_header import ModelUnreadable
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
from serve.engines.transformers.loading import load_model, start_batching, tokenizer_folder
from serve.engines.transformers.memory import Files
from serve.engines.transformers.request_stream import RequestStream, tools_of
from serve.engines.transformers.sampling import Sampler, Sampling
from serve.engines.transformers.text_stream import CALL

# Threads of torch that wait for each other by spinning take the time that the others need.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

UNDERSTOOD = {
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
CHOICES = {"temperature", "top_k", "top_p", "min_p", "seed", "frequency_penalty", "presence_penalty"}


class LoadedFolder:
    """Made and closed in a thread of its own: both take a while."""

    adapters = ()  # one that there is, is merged

    def __init__(
        self,
        files: Files,
        context: int,
        settings: EngineSettings,
        purpose: Purpose,
    ) -> None:
        torch.set_num_threads(settings.threads or os.cpu_count() or 1)
        disable_progress_bar()
        self._context = context
        self._embedding, self._starting = asyncio.Lock(), asyncio.Lock()
        self._sampler = Sampler()
        self._manager: Any = None  # of the batch; embeddings are made without one
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_folder(files))
            self._model = load_model(files, settings)
            if purpose == "answers":
                self._manager = start_batching(self._model, self._sampler, context, settings)
                self._start()
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise ModelUnreadable(f"transformers cannot load this model: {_first(error)}") from error

    async def answer(self, request: Request, reference: str) -> AsyncGenerator[list[Chunk]]:
        """Yields what the model says as it says it. Closing it takes the request out of the batch."""
        asked = perf_counter()
        tokens = await asyncio.to_thread(self._read, request)
        room = self._context - len(tokens)
        longest = min(request.get("max_tokens", room), room)
        sampling = _sampling(request)
        telling = RequestStream(request, self._tokenizer, sampling)
        ends, first = self._ends(), None
        spoken = self._speak(tokens, longest, sampling, ends) if longest else _silence()
        finish, count = "length", 0
        async with aclosing(spoken):
            async for token in spoken:
                first = first or perf_counter()
                count += 1
                if token in ends:
                    finish = "stop"
                elif chunks := telling.hear(token):
                    yield chunks
                if telling.stopped:
                    finish = "stop"
                    break
        usage = {"prompt_tokens": len(tokens), "completion_tokens": count, "total_tokens": len(tokens) + count}
        ended = perf_counter()
        timings = {"prompt_ms": ((first or ended) - asked) * 1000, "predicted_ms": (ended - (first or ended)) * 1000}
        yield [*telling.end(finish), {"choices": [], "usage": usage, "timings": timings}]

    async def embed(self, texts: Sequence[str]) -> Embedded:
        """The mean of what the last layer says of each token, of length 1."""
        async with self._embedding:
            return await asyncio.to_thread(self._embed, texts)

    async def rank(self, query: str, documents: Sequence[str]) -> Ranked:
        raise RequestRefused("A model that is no GGUF does not rank texts here: export it.")

    def close(self) -> None:
        if self._manager is not None:
            self._manager.stop(hard_stop=True)
            self._manager.destroy()
        del self._manager, self._model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _start(self) -> None:
        """Also after a step that broke: that costs those who were in it.

        From a thread that ends with the process, because transformers' own inherits that from it.
        """
        self._manager.join(perf_counter())
        starting = Thread(target=self._manager.start, daemon=True)
        starting.start()
        starting.join()

    async def _speak(self, tokens: list[int], longest: int, sampling: Sampling, ends: set[int]) -> AsyncGenerator[int]:
        manager = self._manager
        async with self._starting:
            if manager.background_thread_status.can_accept_new_requests() is not None:
                await asyncio.to_thread(self._start)
        identifier = token_hex(12)
        arrived = asyncio.Queue[Any]()
        self._sampler.of[identifier] = sampling
        manager.register_result_handler(identifier, arrived.put_nowait)
        heard, told = 0, None
        try:
            added = manager.add_request(
                tokens, request_id=identifier, max_new_tokens=longest, streaming=True, eos_token_id=list(ends)
            )
            if added is None:
                raise EngineFailed("The engine could not answer: it has just stopped.")
            while told is None or not told.is_finished():
                told = await arrived.get()
                if told.error is not None:
                    raise EngineFailed(f"The engine could not answer: {told.error.splitlines()[0].rstrip('.')}.")
                for token in told.generated_tokens[heard:]:
                    heard += 1
                    yield token
        finally:
            if told is None or not told.is_finished():
                manager.cancel_request(identifier)
            manager.output_router.result_handlers.pop(identifier, None)
            while not manager.output_router.output_queue.empty():  # words for those who have gone away
                manager.output_router.output_queue.get_nowait()
            self._sampler.of.pop(identifier, None)

    def _read(self, request: Request) -> list[int]:
        tokens = self._plain(request["prompt"]) if "prompt" in request else self._in_template(request)
        if not tokens:
            raise RequestRefused("The model cannot take this request: there is nothing to go on from.")
        if len(tokens) >= self._context:
            raise ContextExceeded(
                f"The conversation has {len(tokens)} tokens; the model takes {self._context} with its answer."
            )
        return tokens

    def _plain(self, text: str) -> list[int]:
        return self._tokenizer(text)["input_ids"]

    def _in_template(self, request: Request) -> list[int]:
        template = self._tokenizer.chat_template
        if not template:
            raise RequestRefused("This model has no template for conversations: it only goes on from a prompt.")
        tools = tools_of(request)
        if tools and CALL not in str(template):
            raise RequestRefused(f"This model's template writes calls of tools in another way than {CALL}: no tools.")
        try:
            return self._tokenizer.apply_chat_template(
                request["messages"],
                tools=tools or None,
                add_generation_prompt=True,
                return_dict=False,
                **request.get("chat_template_kwargs", {}),
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise RequestRefused(f"The messages do not fit the model's template: {_first(error)}") from error

    def _ends(self) -> set[int]:
        """The tokens that end an answer."""
        said = [self._model.generation_config.eos_token_id, self._tokenizer.eos_token_id]
        return {token for one in said if one is not None for token in (one if isinstance(one, list) else [one])}

    @torch.inference_mode()
    def _embed(self, texts: Sequence[str]) -> Embedded:
        vectors: list[list[float]] = []
        count = 0
        for text in texts:
            tokens = self._plain(text)
            if len(tokens) > self._context:
                raise TextTooLong(
                    f"A text has {len(tokens)} tokens; the model takes {self._context}.",
                    details={"tokens": len(tokens), "most": self._context},
                )
            if not tokens:
                raise RequestRefused("The model cannot take this request: a text is empty.")
            hidden = self._model.base_model(torch.tensor([tokens], device=self._model.device)).last_hidden_state
            mean = hidden[0].float().mean(0)
            vectors.append((mean / mean.norm().clamp_min(1e-12)).tolist())
            count += len(tokens)
        return Embedded(vectors, count)


def _sampling(request: Request) -> Sampling:
    understood = UNDERSTOOD | CHOICES | {"logit_bias"}
    extra = {name for name in request if name not in understood and not _says_nothing(name, request[name])}
    if extra:
        raise RequestRefused(
            f"This model is run by transformers, where {', '.join(sorted(extra))} cannot be heeded: leave it out, or "
            "export the model as GGUF."
        )
    wanted: dict[str, Any] = {name: request[name] for name in CHOICES if name in request}
    wanted["logit_bias"] = dict(request.get("logit_bias", []))
    logprobs = request.get("logprobs")
    if isinstance(logprobs, bool):
        wanted["told"] = request.get("top_logprobs", 0) if logprobs else None
    else:  # of a prompt that is gone on from, it is their number
        wanted["told"] = logprobs
    return Sampling(**wanted)


def _says_nothing(name: str, value: Any) -> bool:
    """Some say what is so anyway."""
    usual: Mapping[str, Any] = {"response_format": {"type": "text"}, "repeat_penalty": 1, "typical_p": 1, "mirostat": 0}
    return name in usual and value == usual[name]


async def _silence() -> AsyncGenerator[int]:
    for token in ():
        yield token


def _first(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".") + "."
