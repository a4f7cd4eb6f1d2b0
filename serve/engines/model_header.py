"""What a GGUF file says of its model, and how much memory that needs: read in milliseconds, without its weights."""

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
LONGEST_KEPT_ARRAY = 1024
"""Of numbers, such as the heads of each layer. Of longer ones, and of strings, only the length is kept."""
QUANTIZATIONS = {
    **{0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 7: "q8_0", 8: "q5_0", 9: "q5_1", 10: "q2_k", 11: "q3_k_s"},
    **{12: "q3_k_m", 13: "q3_k_l", 14: "q4_k_s", 15: "q4_k_m", 16: "q5_k_s", 17: "q5_k_m", 18: "q6_k", 32: "bf16"},
}
"""By llama.cpp's numbers (llama_ftype)."""
ELEMENT_BYTES = 2  # of the cache of keys and values, which is in f16
RANKING = 4
"""The way of pooling whose outcome is a single number."""
BATCH = 512


class ModelUnreadable(ForgearrError):
    """The engine cannot read this model."""

    code = "MODEL_UNREADABLE"


@dataclass(frozen=True)
class Header:
    architecture: str
    file_bytes: int
    context: int  # tokens that the model was made for
    layers: int
    width: int
    key_values: int  # numbers that one layer keeps of one token
    vocabulary: int
    parameters: int
    template: str  # of conversations, in Jinja; empty where it has none
    pools: bool  # made for embeddings: it says itself how those of the tokens become that of a text
    ranks: bool  # made to say how well a text fits a question
    gap: tuple[int, int, int] | None  # tokens that stand before what precedes a gap, what follows it, and what fills it
    quantization: str = "unknown"  # as its file says

    def memory(self, context: int, slots: int, batch: int = BATCH) -> int:
        """Bytes for weights, cache and working space, when each of the slots holds so many tokens."""
        cache = self.layers * self.key_values * ELEMENT_BYTES * context * slots
        return self.file_bytes + cache + 4 * batch * (self.vocabulary + 4 * self.width)


def read_header(path: Path) -> Header:
    with _opened(path) as content:
        return _header(*_fields(content), len(content))


def read_fields(path: Path) -> dict[str, Any]:
    """The metadata alone, which an adapter has too."""
    with _opened(path) as content:
        return _fields(content)[0]


@contextmanager
def _opened(path: Path) -> Generator[mmap.mmap]:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            yield content
    except (struct.error, ValueError, KeyError, IndexError, UnicodeDecodeError) as error:
        raise ModelUnreadable(f"{path.name} is not a GGUF file of a model: {error or 'it breaks off'}.") from error


def _header(fields: Mapping[str, Any], parameters: int, size: int) -> Header:
    architecture = fields["general.architecture"]
    heads = _most(fields.get(f"{architecture}.attention.head_count", 1)) or 1
    head_width = fields[f"{architecture}.embedding_length"] // heads
    keys = fields.get(f"{architecture}.attention.key_length", head_width)
    values = fields.get(f"{architecture}.attention.value_length", head_width)
    return Header(
        architecture=architecture,
        file_bytes=size,
        context=fields[f"{architecture}.context_length"],
        layers=fields[f"{architecture}.block_count"],
        width=fields[f"{architecture}.embedding_length"],
        key_values=_most(fields.get(f"{architecture}.attention.head_count_kv", heads)) * (keys + values),
        vocabulary=fields["tokenizer.ggml.tokens"],
        parameters=parameters,
        template=fields.get("tokenizer.chat_template", ""),
        pools=bool(fields.get(f"{architecture}.pooling_type")),
        ranks=fields.get(f"{architecture}.pooling_type") == RANKING,
        gap=_gap(fields),
        quantization=QUANTIZATIONS.get(fields.get("general.file_type", -1), "unknown"),
    )


def _gap(fields: Mapping[str, Any]) -> tuple[int, int, int] | None:
    before, after, between = (fields.get(f"tokenizer.ggml.fim_{part}_token_id") for part in ("pre", "suf", "mid"))
    return None if before is None or after is None or between is None else (before, after, between)


def _most(value: int | list[int]) -> int:
    return max(value) if isinstance(value, list) else value


def _fields(content: mmap.mmap) -> tuple[dict[str, Any], int]:
    """The metadata at the beginning of the file, and how many parameters its tensors have."""
    if content[:4] != MAGIC:
        raise ValueError("it does not begin as one")
    version, tensors, count = struct.unpack_from("<IQQ", content, 4)
    if version not in VERSIONS:
        raise ValueError(f"it has version {version} of the format")
    place = 24
    fields: dict[str, Any] = {}
    for _ in range(count):
        name, place = _string(content, place)
        (kind,) = struct.unpack_from("<I", content, place)
        fields[name], place = _value(content, place + 4, kind)
    return fields, sum(_sizes(content, place, tensors))


def _sizes(content: mmap.mmap, place: int, tensors: int) -> Iterator[int]:
    """How many numbers each of the tensors has, that are told of after the metadata."""
    for _ in range(tensors):
        _, place = _string(content, place)
        (dimensions,) = struct.unpack_from("<I", content, place)
        yield math.prod(struct.unpack_from(f"<{dimensions}Q", content, place + 4))
        place += 4 + 8 * dimensions + 12  # its type and its place in the file


def _value(content: mmap.mmap, place: int, kind: int) -> tuple[Any, int]:
    if kind == STRING:
        return _string(content, place)
    if kind == ARRAY:
        return _array(content, place)
    return struct.unpack_from(SCALARS[kind], content, place)[0], place + struct.calcsize(SCALARS[kind])


def _array(content: mmap.mmap, place: int) -> tuple[Any, int]:
    kind, count = struct.unpack_from("<IQ", content, place)
    place += 12
    if kind == STRING:
        for _ in range(count):
            (length,) = struct.unpack_from("<Q", content, place)
            place += 8 + length
        return count, place
    form = SCALARS[kind]
    end = place + count * struct.calcsize(form)
    if count > LONGEST_KEPT_ARRAY:
        return count, end
    return list(struct.unpack_from(f"<{count}{form[1]}", content, place)), end


def _string(content: mmap.mmap, place: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", content, place)
    text = content[place + 8 : place + 8 + length]
    if len(text) != length:
        raise ValueError("it breaks off")
    return text.decode(), place + 8 + length
