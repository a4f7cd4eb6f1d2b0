"""Merge an adapter into its base model. Needs torch, which is imported when it happens."""

import shutil
from pathlib import Path
from typing import Any

from jobs.execution.isolated import OnProgress
from pipelines.training.models.remote_code import forget_code


def merge_only(base: str, adapter: str, target: str, report: OnProgress) -> None:
    """`merge` as a step in a process of its own (jobs/execution/isolated.py)."""
    report(0, "merging")
    merge(Path(base), Path(adapter), Path(target))


def merge(base: Path, adapter: Path, target: Path) -> None:
    """Write the base with the adapter merged into it, in the precision of the base."""
    from transformers import AutoTokenizer

    load_merged(base, adapter).save_pretrained(target)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(target)
    forget_code(target)
    vocabulary = base / "tokenizer.model"
    if vocabulary.exists() and not (target / vocabulary.name).exists():
        shutil.copy(vocabulary, target)  # transformers does not need it, but the converter does


def load_merged(base: Path | str, adapter: Path | str) -> Any:
    """Load a base with an adapter merged into it. A base in 4 bits is dequantized first."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load_dequantized(base), str(adapter)).merge_and_unload(safe_merge=True)


def load_dequantized(model: Path | str) -> Any:
    """Load a model. One in 4 or 8 bits is dequantized, because llama.cpp's converter does not read those."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto", use_safetensors=True)  # pickles run code
    if getattr(loaded, "hf_quantizer", None) is None:
        return loaded
    dequantized: Any = loaded.dequantize()
    dequantized._weight_conversions = None  # saving would try to reverse the conversions of loading, and fail
    return dequantized
