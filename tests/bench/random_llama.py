"""A Llama of random weights with the tokenizer of forgearr/tiny: as slow as a model of its size, and as ignorant.

`python -m tests.bench.random_llama FOLDER WIDTH LAYERS`: prints how many million parameters it has.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pipelines.training.models import tiny


def build(folder: Path, width: int, layers: int) -> float:
    tokenizer = AutoTokenizer.from_pretrained(tiny.model_folder())
    config = LlamaConfig(
        vocab_size=tiny.VOCABULARY_SIZE,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=tiny.CONTEXT_LENGTH,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters() / 1e6


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), *map(int, sys.argv[2:])))
