"""Build `forgearr/tiny`: a Llama with 2.9 million random parameters, made in seconds.

Untrained, it answers with noise. With it, the whole pipeline from data to a served model runs on any machine, offline,
in a minute. It can memorize some dozens of answers and little more.

The build is deterministic. The tokenizer is a byte-level BPE learned from configs/tiny/corpus.txt. The chat template is
like Qwen's: tools between <tools> tags, calls as JSON between <tool_call> tags, which llama.cpp parses as calls.
"""

import hashlib
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from cluster import durable
from cluster.settings import home

NAME = "forgearr/tiny"
VOCABULARY_SIZE = 2048
CONTEXT_LENGTH = 2048
SEED = 20
START, END, PADDING = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


def model_folder() -> Path:
    """The model's folder, in the format of transformers. It is built if it does not exist."""
    return ensure(home() / "cache" / folder_name())


def ensure(target: Path) -> Path:
    """Build the model at this path, if it does not exist there."""
    template, corpus = _read_config("chat_template.jinja"), _read_config("corpus.txt")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
        try:
            build(partial, template, corpus)
            durable.publish(partial, target)
        except OSError:
            if not target.exists():  # another process may have been faster
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def folder_name() -> str:
    """The folder's name, which changes with everything that the model is made from."""
    template, corpus = _read_config("chat_template.jinja"), _read_config("corpus.txt")
    version = hashlib.sha256(f"{template}{corpus}{VOCABULARY_SIZE}{CONTEXT_LENGTH}{SEED}".encode()).hexdigest()[:12]
    return f"forgearr-tiny-{version}"


def build(target: Path, template: str, corpus: str) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer(template, corpus)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.convert_tokens_to_ids(PADDING),
        architectures=[LlamaForCausalLM.__name__],
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(config)
    # In a distributed training, the model's own save_pretrained writes in the first process only.
    weights = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}  # it is tied
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(target)
    model.generation_config.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _tokenizer(template: str, corpus: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PADDING, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.splitlines(keepends=True), trainer)
    if missing := VOCABULARY_SIZE - tokenizer.get_vocab_size():  # a short corpus has fewer pairs to merge
        tokenizer.add_special_tokens([f"<|unused_{number}|>" for number in range(missing)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=None,
        eos_token=END,
        pad_token=PADDING,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=template,
    )


def _read_config(name: str) -> str:
    return (files("configs") / "tiny" / name).read_text()
