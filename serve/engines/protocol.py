"""The interface of every engine, and the errors that engines raise.

A request has OpenAI's format, without `model` and `stream`: `messages` of a chat, or a `prompt` to complete. A chunk
has the format of OpenAI's streams: `choices`, each with a delta or a text. The last chunk has no choices, but `usage`
and the engine's `timings` in milliseconds. The route adds the id, the time and the model's name.
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
    """A model or an adapter in the format of transformers, without a GGUF file."""

    address: str | None  # in storage; None: the base model itself
    base_model: str  # any name that pipelines/training/models/base_models.py resolves
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
"""The model that a reference names; its type selects the engine.

None: forgearr/tiny before any training, which is in no registry, or a version that the engine looks up itself.
"""

Phase = Literal["fetching", "waiting for room", "loading"]

BUSY_RETRY_SECONDS = 1


class EngineUnavailable(Unavailable):
    """No engine answers right now; try again in a moment."""

    code = "ENGINE_UNAVAILABLE"


class EngineLost(Unavailable):
    """The engine stopped during this request; send it again."""

    code = "ENGINE_LOST"


class EngineBusy(Unavailable):
    """Too many requests wait for this model already (engines.queue); try again in a moment."""

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
    """The conversation is longer than the context of the model."""

    code = "CONTEXT_LENGTH_EXCEEDED"


class TextTooLong(ContextExceeded):
    """A text is longer than the context of the model."""


@dataclass(frozen=True)
class EmbeddingResult:
    vectors: list[list[float]]  # one for each text, normalized to length 1
    tokens: int


@dataclass(frozen=True)
class Ranking:
    scores: list[float]  # of each document; higher is better
    tokens: int


@dataclass(frozen=True)
class LoadedModelInfo:
    """A model in the memory of an engine."""

    reference: str
    bytes: int
    context: int  # tokens
    users: int  # requests that it answers, and requests that wait for it
    leaves_at: datetime | None = None  # when it is unloaded, unless it is used; None: when its memory is needed


@dataclass(frozen=True)
class LoadingModelInfo:
    """A model that is being loaded."""

    reference: str
    phase: Phase
    progress: float | None  # of this phase, from 0 to 1; None: unknown
    bytes: int | None  # of memory that it needs; None: not known yet
    seconds: float  # since the first request for it


class Engine(Protocol):
    """`reference` names one version (NAME:v3, not NAME:latest); `source` describes what it names.

    `account` is whose share of the engine's slots an answer takes. Empty: the user of this machine.
    """

    def chat(
        self, reference: str, request: EngineRequest, source: Source = None, account: str = ""
    ) -> AsyncGenerator[list[Chunk], None]:
        """Stream a completion in batches of chunks. Closing the stream, or cancelling its reader, stops the model."""
        ...

    async def complete(
        self, reference: str, request: EngineRequest, source: Source = None, account: str = ""
    ) -> dict[str, Any]:
        """Create a completion: `choices` with a message or a text each, `usage` and `timings`."""
        ...

    async def embed(
        self, reference: str, texts: Sequence[str], source: Source = None, account: str = ""
    ) -> EmbeddingResult:
        """Create an embedding of each text."""
        ...

    async def rank(
        self, reference: str, query: str, documents: Sequence[str], source: Source = None, account: str = ""
    ) -> Ranking:
        """Score how well each document fits the query."""
        ...

    async def describe(self, reference: str, source: Source = None) -> Header:
        """Read the header of the model's files. The model need not be in memory."""
        ...

    async def load(self, reference: str, source: Source = None) -> str:
        """Load a model before the first request for it. Returns its reference, with a version instead of `latest`."""
        ...

    async def unload(self, reference: str, source: Source = None) -> bool:
        """Unload a model as soon as no request uses it. Returns whether it was in memory."""
        ...

    async def set_keep_alive(self, reference: str, seconds: float | None, source: Source = None) -> None:
        """Set how long a model stays in memory after its last request. None: no limit."""
        ...

    async def loaded(self) -> list[LoadedModelInfo]:
        """List the models in memory."""
        ...

    async def loading(self) -> list[LoadingModelInfo]:
        """List the models that are being loaded."""
        ...
