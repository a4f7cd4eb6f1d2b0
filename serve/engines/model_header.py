"""Reads the header of a GGUF file, and computes from it how much memory the model needs.

It takes milliseconds, because the weights are not read.
"""

import math
import mmap
import struct
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import ForgearrError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
MAX_ARRAY_LENGTH = 1024
"""For numbers, such as the heads of each layer. Of longer arrays, and of arrays of strings, only the length is read."""
QUANTIZATIONS = {
    **{0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 7: "q8_0", 8: "q5_0", 9: "q5_1", 10: "q2_k", 11: "q3_k_s"},
    **{12: "q3_k_m", 13: "q3_k_l", 14: "q4_k_s", 15: "q4_k_m", 16: "q5_k_s", 17: "q5_k_m", 18: "q6_k", 32: "bf16"},
}
"""By llama.cpp's `llama_ftype`."""
ELEMENT_BYTES = 2  # of the key-value cache, which is in f16
RANK_POOLING = 4
"""llama.cpp's LLAMA_POOLING_TYPE_RANK: the result is one number."""
BATCH_TOKENS = 512


class ModelUnreadable(ForgearrError):
    """The engine cannot read this model."""

    code = "MODEL_UNREADABLE"


@dataclass(frozen=True)
class Header:
    architecture: str
    file_bytes: int
    context: int  # tokens, at most
    layers: int
    hidden_size: int
    kv_width: int  # numbers in the key-value cache for one layer and one token
    vocab_size: int
    parameters: int
    template: str  # of chats, in Jinja; empty if there is none
    has_pooling: bool  # an embedding model: it defines how token embeddings become the embedding of a text
    is_reranker: bool  # it scores how well a text fits a query
    fim_tokens: tuple[int, int, int] | None  # for fill in the middle: before the prefix, the suffix, the middle
    quantization: str = "unknown"
    tool_template: str = ""  # of chats with tools, if it is another one

    def memory_bytes(self, context: int, slots: int, batch: int = BATCH_TOKENS) -> int:
        """Bytes for the weights, the key-value cache and working memory, if each slot holds `context` tokens."""
        cache = self.layers * self.kv_width * ELEMENT_BYTES * context * slots
        return self.file_bytes + cache + 4 * batch * (self.vocab_size + 4 * self.hidden_size)


def read_header(path: Path) -> Header:
    with _opened(path) as content:
        return _header(*_fields(content), len(content))


def read_fields(path: Path) -> dict[str, Any]:
    """Only the metadata, which the file of an adapter has too."""
    with _opened(path) as content:
        return _fields(content)[0]


@contextmanager
def _opened(path: Path) -> Generator[mmap.mmap]:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            yield content
    except (struct.error, ValueError, KeyError, IndexError, UnicodeDecodeError) as error:
        raise ModelUnreadable(f"{path.name} is not a GGUF file of a model: {error or 'it is truncated'}.") from error


def _header(fields: Mapping[str, Any], parameters: int, size: int) -> Header:
    architecture = fields["general.architecture"]
    heads = _max_of(fields.get(f"{architecture}.attention.head_count", 1)) or 1
    head_width = fields[f"{architecture}.embedding_length"] // heads
    keys = fields.get(f"{architecture}.attention.key_length", head_width)
    values = fields.get(f"{architecture}.attention.value_length", head_width)
    return Header(
        architecture=architecture,
        file_bytes=size,
        context=fields[f"{architecture}.context_length"],
        layers=fields[f"{architecture}.block_count"],
        hidden_size=fields[f"{architecture}.embedding_length"],
        kv_width=_max_of(fields.get(f"{architecture}.attention.head_count_kv", heads)) * (keys + values),
        vocab_size=fields["tokenizer.ggml.tokens"],
        parameters=parameters,
        template=fields.get("tokenizer.chat_template", ""),
        has_pooling=bool(fields.get(f"{architecture}.pooling_type")),
        is_reranker=fields.get(f"{architecture}.pooling_type") == RANK_POOLING,
        fim_tokens=_fim_tokens(fields),
        quantization=QUANTIZATIONS.get(fields.get("general.file_type", -1), "unknown"),
        tool_template=fields.get("tokenizer.chat_template.tool_use", ""),
    )


def _fim_tokens(fields: Mapping[str, Any]) -> tuple[int, int, int] | None:
    prefix, suffix, middle = (fields.get(f"tokenizer.ggml.fim_{part}_token_id") for part in ("pre", "suf", "mid"))
    return None if prefix is None or suffix is None or middle is None else (prefix, suffix, middle)


def _max_of(value: int | list[int]) -> int:
    return max(value) if isinstance(value, list) else value


def _fields(content: mmap.mmap) -> tuple[dict[str, Any], int]:
    """The metadata at the start of the file, and the number of parameters in its tensors."""
    if content[:4] != MAGIC:
        raise ValueError("it does not start with 'GGUF'")
    version, tensors, count = struct.unpack_from("<IQQ", content, 4)
    if version not in VERSIONS:
        raise ValueError(f"it has version {version} of the format")
    offset = 24
    fields: dict[str, Any] = {}
    for _ in range(count):
        name, offset = _string(content, offset)
        (kind,) = struct.unpack_from("<I", content, offset)
        fields[name], offset = _value(content, offset + 4, kind)
    return fields, sum(_tensor_sizes(content, offset, tensors))


def _tensor_sizes(content: mmap.mmap, offset: int, tensors: int) -> Iterator[int]:
    """The size of each tensor, from the table that follows the metadata."""
    for _ in range(tensors):
        _, offset = _string(content, offset)
        (dimensions,) = struct.unpack_from("<I", content, offset)
        yield math.prod(struct.unpack_from(f"<{dimensions}Q", content, offset + 4))
        offset += 4 + 8 * dimensions + 12  # the tensor's type and its offset in the file


def _value(content: mmap.mmap, offset: int, kind: int) -> tuple[Any, int]:
    if kind == STRING:
        return _string(content, offset)
    if kind == ARRAY:
        return _array(content, offset)
    return struct.unpack_from(SCALARS[kind], content, offset)[0], offset + struct.calcsize(SCALARS[kind])


def _array(content: mmap.mmap, offset: int) -> tuple[Any, int]:
    kind, count = struct.unpack_from("<IQ", content, offset)
    offset += 12
    if kind == STRING:
        for _ in range(count):
            (length,) = struct.unpack_from("<Q", content, offset)
            offset += 8 + length
        return count, offset
    scalar_format = SCALARS[kind]
    end = offset + count * struct.calcsize(scalar_format)
    if count > MAX_ARRAY_LENGTH:
        return count, end
    return list(struct.unpack_from(f"<{count}{scalar_format[1]}", content, offset)), end


def _string(content: mmap.mmap, offset: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", content, offset)
    text = content[offset + 8 : offset + 8 + length]
    if len(text) != length:
        raise ValueError("it is truncated")
    return text.decode(), offset + 8 + length
