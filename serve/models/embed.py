"""Creates embeddings as clients need them: truncated texts, fewer dimensions, base64."""

import base64
import math
import struct
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from cluster.errors import InvalidRequest
from serve.engines.protocol import EmbeddingResult, Engine, TextTooLong
from serve.models.resolver import ResolvedModel


class TooManyDimensions(InvalidRequest):
    """The model's embeddings have fewer dimensions."""

    code = "TOO_MANY_DIMENSIONS"


async def embed(
    engine: Engine,
    model: ResolvedModel,
    texts: Sequence[str],
    *,
    dimensions: int | None = None,
    truncate: bool = False,
) -> EmbeddingResult:
    """Embed each text in a call of its own, so that one request does not block all others."""
    vectors: list[list[float]] = []
    tokens = 0
    for text in texts:
        embedded = await _embed(engine, model, text, truncate)
        vectors += [_truncated(vector, dimensions) for vector in embedded.vectors]
        tokens += embedded.tokens
    return EmbeddingResult(vectors, tokens)


def as_base64(vector: Sequence[float]) -> str:
    """Encode as OpenAI does: little-endian floats of 4 bytes."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


async def _embed(engine: Engine, model: ResolvedModel, text: str, truncate: bool) -> EmbeddingResult:
    while True:
        try:
            return await engine.embed(model.reference, [text], model.source, model.account)
        except TextTooLong as error:
            if not truncate:
                raise
            tokens, limit = (int(str(error.details[name])) for name in ("tokens", "most"))
            text = text[: max(1, min(len(text) - 1, len(text) * limit // tokens))]


def _truncated(vector: list[float], dimensions: int | None) -> list[float]:
    if dimensions is None or dimensions == len(vector):
        return vector
    if dimensions > len(vector):
        raise TooManyDimensions(f"The model's embeddings have {len(vector)} dimensions, not {dimensions}.")
    first = vector[:dimensions]
    length = math.sqrt(sum(value * value for value in first)) or 1.0
    return [value / length for value in first]


MAX_TEXTS = 2048
"""OpenAI's limit."""
Text = Annotated[str, Field(min_length=1)]
Texts = Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)]


def texts_of(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts
