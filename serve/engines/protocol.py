"""What every engine offers to the gateway, and the errors that it answers with.

A request is OpenAI's, without `model` and `stream`: `messages` to answer, or a `prompt` to go on from. A chunk is what
OpenAI streams: `choices` with a delta each, or with text; the last one has none, but the `usage`, and the engine's own
`timings` in milliseconds. Who tells a client adds id, time and the name that it asked for.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, Protocol

from cluster.errors import ForgearrError, InvalidRequest, Unavailable
from pipelines.training.models.versions import Version
from serve.engines.model_header import Header

EngineRequest = Mapping[str, Any]
Chunk = dict[str, Any]


@dataclass(frozen=True)
class ModelFolder:
    """A model as transformers has it, which has no GGUF yet: a whole one, or an adapter."""

    address: str | None  # in storage; None: the base model as it is
    base_model: str  # what an adapter is for: any name that pipelines/training/models/base_models.py knows
    created_at: datetime


@dataclass(frozen=True)
class OllamaModel:
    """A model of the configured Ollama server."""

    name: str
    digest: str
    bytes: int
    base_model: str
    quantization: str
    created_at: datetime


Source = Version | ModelFolder | OllamaModel | None
"""What a name means, and so which engine answers. None: forgearr/tiny as it comes, which is in no registry."""

Phase = Literal["fetching", "waiting for room", "loading"]

BUSY_RETRY_SECONDS = 1


class EngineUnavailable(Unavailable):
    """No engine answers right now; try again in a moment."""

    code = "ENGINE_UNAVAILABLE"


class EngineLost(Unavailable):
    """The engine ended in the middle of this answer; ask again."""

    code = "ENGINE_LOST"


class EngineBusy(Unavailable):
    """As many requests as engines.queue allows wait for this model already; try again in a moment."""

    code = "ENGINE_BUSY"
    retry_after = BUSY_RETRY_SECONDS


class EngineFailed(ForgearrError):
    """The engine could not answer."""

    code = "ENGINE_FAILED"


class ModelTooLarge(ForgearrError):
    """The model needs more memory than engines.memory_mb allows."""

    code = "MODEL_TOO_LARGE"


class RequestRefused(InvalidRequest):
    """The model cannot answer this request."""

    code = "REQUEST_REFUSED"


class ContextExceeded(InvalidRequest):
    """The conversation is longer than the model can read."""

    code = "CONTEXT_LENGTH_EXCEEDED"


class TextTooLong(ContextExceeded):
    """A text is longer than the model can read at once."""


@dataclass(frozen=True)
class EmbeddingResult:
    vectors: list[list[float]]  # one for each text, of length 1
    tokens: int


@dataclass(frozen=True)
class Ranking:
    scores: list[float]  # how well each document fits; more is better
    tokens: int


@dataclass(frozen=True)
class LoadedModelInfo:
    """A model in the memory of an engine."""

    reference: str
    bytes: int
    context: int  # tokens that a conversation may have
    users: int  # requests that it answers, or that wait for it
    leaves_at: datetime | None = None  # unless it is used again; None: when its memory is needed


@dataclass(frozen=True)
class LoadingModelInfo:
    """A model on its way into the memory of an engine."""

    reference: str
    phase: Phase
    progress: float | None  # which part of this phase is done, from 0 to 1; None: nobody knows
    bytes: int | None  # that it will take; None: not known yet
    seconds: float  # since somebody asked for it


class Engine(Protocol):
    """`reference` names a model for good (NAME:v3, not NAME:latest); `source` says what it is."""

    def chat(self, reference: str, request: EngineRequest, source: Source = None) -> AsyncGenerator[list[Chunk], None]:
        """The answer as it is made, in batches of chunks. Closing it, or cancelling its reader, ends the work."""
        ...

    async def complete(self, reference: str, request: EngineRequest, source: Source = None) -> dict[str, Any]:
        """The whole answer: `choices` with a message or a text each, `usage` and `timings`."""
        ...

    async def embed(self, reference: str, texts: Sequence[str], source: Source = None) -> EmbeddingResult:
        """What texts mean, as numbers."""
        ...

    async def rank(self, reference: str, query: str, documents: Sequence[str], source: Source = None) -> Ranking:
        """How well documents fit a question."""
        ...

    async def describe(self, reference: str, source: Source = None) -> Header:
        """What a model's file says of it."""
        ...

    async def load(self, reference: str, source: Source = None) -> str:
        """Have a model in memory before anybody asks for it; returns what NAME:latest stood for."""
        ...

    async def unload(self, reference: str, source: Source = None) -> bool:
        """Let a model go as soon as nobody uses it; whether it was there."""
        ...

    async def set_keep_alive(self, reference: str, seconds: float | None, source: Source = None) -> None:
        """How long a model stays when its present answers are given, unless it is used again. None: it stays."""
        ...

    async def loaded(self) -> list[LoadedModelInfo]:
        """The models in memory."""
        ...

    async def loading(self) -> list[LoadingModelInfo]:
        """The models on their way there."""
        ...
