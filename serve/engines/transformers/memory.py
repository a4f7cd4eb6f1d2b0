"""Reads the configuration of a transformers model from its folder, and computes how much memory the model needs.

The weights are not read.
"""

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.training.models.chat_template import read_chat_templates
from serve.engines.model_header import Header, ModelUnreadable

BATCH_TOKENS = 512
"""Tokens of prompts that are processed in one step."""
BLOCK_TOKENS = 32
"""The cache grows by blocks. Conversations with the same beginning share its blocks."""
NF4_BYTES_PER_WEIGHT = 0.57
"""Including the scale."""
SPARE_BLOCKS = 2


@dataclass(frozen=True)
class TransformersFiles:
    """The folders of a model on this machine."""

    model: Path
    adapter: Path | None


@dataclass(frozen=True)
class TensorInfo:
    name: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def is_quantizable(self) -> bool:
        """Whether it is stored in 4 bits: the matrices, except for embeddings and the output layer."""
        return len(self.shape) == 2 and "embed" not in self.name and "lm_head" not in self.name


@dataclass(frozen=True)
class FolderHeader:
    header: Header
    weights: list[TensorInfo]
    attention_width: int  # of all query heads together
    is_quantized: bool  # in the files

    def weight_bytes(self, element_size: int, in_4bit: bool) -> int:
        if self.is_quantized:  # its tensors do not have the shapes of the weights
            return self.header.file_bytes
        size = {True: NF4_BYTES_PER_WEIGHT, False: element_size}
        return int(sum(weight.count * size[in_4bit and weight.is_quantizable] for weight in self.weights))

    def working_bytes(self, context: int, slots: int, element_size: int) -> int:
        """The cache of all slots, the attention mask over it, and the activations of one step."""
        tokens = block_count(context, slots) * BLOCK_TOKENS
        cache = self.header.layers * self.header.kv_width * tokens
        mask = BATCH_TOKENS * tokens
        read = 2 * (self.header.kv_width + self.attention_width) * tokens
        scores = 4 * slots * self.header.vocab_size + 8 * BATCH_TOKENS * self.header.hidden_size
        return element_size * (cache + mask + read + scores)


def block_count(context: int, slots: int) -> int:
    """Blocks of the cache, if each slot holds `context` tokens."""
    return slots * (math.ceil(context / BLOCK_TOKENS) + SPARE_BLOCKS)


def read_folder(model: Path, name: str) -> FolderHeader:
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(model)
        weights = [weight for file in sorted(model.glob("*.safetensors")) for weight in _weights(file)]
        text = config.get_text_config()
        heads = text.num_attention_heads
        head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
        return FolderHeader(
            header=Header(
                architecture=config.model_type,
                file_bytes=sum(file.stat().st_size for file in model.glob("*.safetensors")),
                context=text.max_position_embeddings,
                layers=text.num_hidden_layers,
                hidden_size=text.hidden_size,
                kv_width=2 * (getattr(text, "num_key_value_heads", None) or heads) * head_width,
                vocab_size=text.vocab_size,
                parameters=sum(weight.count for weight in weights),
                template=read_chat_templates(model).get("default", ""),
                has_pooling=False,
                is_reranker=False,
                fim_tokens=None,
            ),
            weights=weights,
            attention_width=heads * head_width,
            is_quantized=getattr(config, "quantization_config", None) is not None,
        )
    except (OSError, ValueError, KeyError, AttributeError, struct.error) as error:
        raise ModelUnreadable(f"transformers cannot read the model {name}: {str(error).splitlines()[0]}") from error


def adapter_bytes(adapter: Path) -> int:
    return sum(4 * weight.count for file in adapter.glob("adapter_model.safetensors") for weight in _weights(file))


def _weights(file: Path) -> Iterator[TensorInfo]:
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        tensors: dict[str, Any] = json.loads(opened.read(length))
    return (TensorInfo(name, tuple(tensor["shape"])) for name, tensor in tensors.items() if name != "__metadata__")
