"""GGUF files for tests: tiny Llamas, written in milliseconds without torch or a converter.

Their vocabulary is the 256 bytes and one pair. One kind has random weights. The other always generates the same text,
because each of its tokens has only one successor.
"""

from collections.abc import Mapping
from importlib.resources import files
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFWriter, LlamaFileType, TokenType

from pipelines.training.models import tiny

HEAD_WIDTH = 16
MERGED = ("H", "i")  # this type of vocabulary needs at least one merged pair
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CERTAIN = 10.0
MAX_PIECE = 12
LORA_RANK = 8
FILL_IN_MIDDLE = [f"tokenizer.ggml.fim_{part}_token_id" for part in ("pre", "suf", "mid")]
RANKING = {"llama.pooling_type": 4}
CONTENT_BLOCK = "{%- if message.content %}"
THINKING_BLOCK = (
    "{%- if message.reasoning_content %}"
    "{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{%- endif %}"
)
"""Parts of the template of forgearr/tiny: the content of a message, and the reasoning before it."""

Weights = dict[str, Any]


def write_model(
    path: Path,
    *,
    seed: int = 0,
    layers: int = 2,
    heads: int = 4,
    context: int = 2048,
    talkative: bool = False,
    ranks: bool = False,
) -> Path:
    """A model with random weights. A talkative one never ends its completion; one that ranks has a pooling type."""
    tokens = [*_byte_characters(), "".join(MERGED), *SPECIAL_TOKENS]
    random = np.random.default_rng(seed)
    width = heads * HEAD_WIDTH
    weights = {name: random.normal(0, 0.3, shape) for name, shape in _shapes(layers, width, len(tokens)).items()}
    if talkative:
        weights["output.weight"][-len(SPECIAL_TOKENS) :] = 0
    return _write(path, tokens, weights, layers, heads, context, metadata=RANKING if ranks else {})


def write_constant_model(
    path: Path, text: str, *, context: int = 2048, fills_gaps: bool = False, thinks: bool = False
) -> Path:
    """A model that generates this text for every prompt.

    With `fills_gaps` it has tokens for filling in the middle; with `thinks` its template puts thinking into <think>.
    """
    known = [*_byte_characters(), "".join(MERGED), *SPECIAL_TOKENS]
    pieces = _pieces(text, set(known))
    tokens = known[: -len(SPECIAL_TOKENS)] + pieces + SPECIAL_TOKENS
    heads = -(-len(tokens) // HEAD_WIDTH)
    width = heads * HEAD_WIDTH
    weights = {name: np.zeros(shape) for name, shape in _shapes(1, width, len(tokens)).items()}
    weights["token_embd.weight"][: len(tokens), : len(tokens)] = np.eye(len(tokens))
    # A prompt ends with a newline, after "assistant".
    sequence = [tokens.index(_visible("\n")), *range(tokens.index(pieces[0]), tokens.index(pieces[-1]) + 1)]
    for before, after in zip(sequence, [*sequence[1:], tokens.index("<|im_end|>")], strict=True):
        weights["output.weight"][after, before] = CERTAIN
    gap_tokens = [tokens.index(token) for token in (*SPECIAL_TOKENS[:2], _visible("\n"))] if fills_gaps else []
    metadata = dict(zip(FILL_IN_MIDDLE, gap_tokens, strict=False))
    return _write(path, tokens, weights, 1, heads, context, metadata=metadata, thinks=thinks)


def write_adapter(path: Path, *, seed: int = 0, layers: int = 2, heads: int = 4, strength: float = 1.0) -> Path:
    """A LoRA for a model of random weights of the same shape. With strength 0 it has no effect."""
    random = np.random.default_rng(seed)
    width = heads * HEAD_WIDTH
    writer = GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", LORA_RANK)
    for layer in range(layers):
        for name in ("attn_v", "attn_output"):
            down = random.normal(0, 0.3, (LORA_RANK, width))
            up = strength * random.normal(0, 0.3, (width, LORA_RANK))
            writer.add_tensor(f"blk.{layer}.{name}.weight.lora_a", down.astype(np.float32))
            writer.add_tensor(f"blk.{layer}.{name}.weight.lora_b", up.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def replace_template(model: Path, target: Path, template: str, field: str = "tokenizer.chat_template") -> Path:
    """A copy of a model with another chat template."""
    reader = GGUFReader(model)
    writer = GGUFWriter(target, "llama")
    for name, value in reader.fields.items():
        if not name.startswith("GGUF.") and name not in {"general.architecture", field}:
            writer.add_key_value(name, value.contents(), value.types[0], (value.types[1:] or [None])[0])
    writer.add_string(field, template)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _shapes(layers: int, width: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocabulary, width),
        "output.weight": (vocabulary, width),
    }
    for layer in range(layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{layer}.{name}.weight"] = (width, width)
        shapes[f"blk.{layer}.ffn_gate.weight"] = shapes[f"blk.{layer}.ffn_up.weight"] = (2 * width, width)
        shapes[f"blk.{layer}.ffn_down.weight"] = (width, 2 * width)
    return shapes


def _write(
    path: Path,
    tokens: list[str],
    weights: Weights,
    layers: int,
    heads: int,
    context: int,
    *,
    metadata: Mapping[str, int] = MappingProxyType({}),
    thinks: bool = False,
) -> Path:
    width = heads * HEAD_WIDTH
    norms = ["output_norm", *(f"blk.{layer}.{norm}_norm" for layer in range(layers) for norm in ("attn", "ffn"))]
    writer = GGUFWriter(path, "llama")
    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_block_count(layers)
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(HEAD_WIDTH)
    writer.add_layer_norm_rms_eps(1e-5)
    _add_vocabulary(writer, tokens)
    for name, number in metadata.items():
        writer.add_uint32(name, number)
    writer.add_chat_template(_chat_template(thinks))
    for name, values in (weights | {f"{norm}.weight": np.ones(width) for norm in norms}).items():
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: GGUFWriter, tokens: list[str]) -> None:
    types = [TokenType.CONTROL if token in SPECIAL_TOKENS else TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(MERGED)])
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_add_bos_token(False)


def _chat_template(thinks: bool) -> str:
    template = (files("configs") / "tiny" / "chat_template.jinja").read_text()
    return template.replace(CONTENT_BLOCK, THINKING_BLOCK + CONTENT_BLOCK) if thinks else template


def _pieces(text: str, taken: set[str]) -> list[str]:
    """Split the text into parts that are all different, so that each can be a token."""
    pieces: list[str] = []
    rest = _visible(text)
    while rest:
        # The last piece takes the rest: single characters are all taken.
        sizes = range(MAX_PIECE if len(rest) > 2 * MAX_PIECE else len(rest), len(rest) + 1)
        length = next(size for size in sizes if rest[:size] not in taken)
        pieces.append(rest[:length])
        taken.add(rest[:length])
        rest = rest[length:]
    return pieces


def _visible(text: str) -> str:
    characters = _byte_characters()
    return "".join(characters[byte] for byte in text.encode())


def _byte_characters() -> list[str]:
    """How GPT-2's vocabulary writes the 256 bytes: invisible ones as characters from 256 on."""
    unseen = count(256)
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    return [chr(byte if byte in seen else next(unseen)) for byte in range(256)]


def write_folder(target: Path, *, spread: float = 0.3, context: int = 2048) -> Path:
    """forgearr/tiny as a folder, with weights spread wider, so that it generates varied tokens."""
    import torch
    from safetensors.torch import load_file, save_file

    shipped = files("configs") / "tiny"
    tiny.build(target, (shipped / "chat_template.jinja").read_text(), (shipped / "corpus.txt").read_text())
    random = torch.Generator().manual_seed(1)
    weights = load_file(target / "model.safetensors")
    for name, values in weights.items():
        if values.dim() == 2:
            weights[name] = torch.randn(values.shape, generator=random) * (spread if "embed" not in name else 0.3)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target
