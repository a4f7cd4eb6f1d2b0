"""Train adapters faster with Unsloth: decide whether a training uses it, import it, and load models with it."""

import os
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from pipelines.training.spec import FineTuneSpec

LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def uses_unsloth(spec: FineTuneSpec) -> bool:
    is_requested = spec.unsloth and spec.tuning != "full" and not spec.pissa
    return is_requested and torch.cuda.is_available() and find_spec("unsloth") is not None


def prefer_unsloth(spec: FineTuneSpec) -> None:
    """Import Unsloth if the training uses it. It patches trl, transformers and peft, so it must be imported first."""
    if not uses_unsloth(spec):
        return
    os.environ["UNSLOTH_RETURN_LOGITS"] = "1"  # the trainer computes its metrics from them
    import_module("unsloth")


def load(spec: FineTuneSpec, base: str, max_length: int) -> Any:
    """The base model, with the adapter added."""
    from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports]

    model, _ = FastLanguageModel.from_pretrained(
        base, max_seq_length=max_length, load_in_4bit=spec.tuning == "qlora", dtype=None
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=spec.rank,
        lora_alpha=spec.alpha or 2 * spec.rank,
        lora_dropout=spec.dropout,
        target_modules=LINEAR_LAYERS if spec.target_modules == "all-linear" else spec.target_modules,
        use_gradient_checkpointing="unsloth",
        random_state=spec.seed,
    )
