"""The step of an export that needs torch: merge an adapter into its base, and run llama.cpp's converter.

The export runs it in a process of its own (jobs/execution/isolated.py), which imports torch once for both.
"""

import json
import logging
import runpy
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from cluster.errors import UnprocessableRequest
from jobs.execution.isolated import OnProgress
from pipelines.training.models.merge import merge
from pipelines.training.models.remote_code import refuse_code

MERGED_FOLDER = "merged"
GPT2_PRE_TOKENIZER = "gpt-2"


class UnsupportedModel(UnprocessableRequest):
    """llama.cpp cannot read a model of this kind."""

    code = "UNSUPPORTED_MODEL"


def convert(
    model: str, base: str | None, file: str, outtype: str, adapter_file: str | None, work: str, report: OnProgress
) -> dict[str, Any]:
    """Write a model as GGUF: `model` itself, or the adapter `model` merged into `base`. Returns the precision."""
    refuse_code()
    source = Path(model)
    if base is not None:
        report(0, "merging")
        source = Path(work) / MERGED_FOLDER
        merge(Path(base), Path(model), source)
    if outtype == "auto":
        outtype = "bf16" if _is_bfloat(source) else "f16"
    report(0, "converting")
    _patch_pre_tokenizer_lookup()
    _run_script("convert_hf_to_gguf", [str(source), "--outfile", file, "--outtype", outtype])
    if base is not None:
        if adapter_file is not None:
            report(1, "converting the adapter")
            config_source = str(source) if _is_quantized(Path(base)) else base  # only its config is read
            _run_script(
                "convert_lora_to_gguf", [model, "--base", config_source, "--outfile", adapter_file, "--outtype", "f16"]
            )
        shutil.rmtree(source)
    return {"outtype": outtype}


def _is_quantized(model: Path) -> bool:
    return "quantization_config" in json.loads((model / "config.json").read_text())


def _is_bfloat(model: Path) -> bool:
    config = json.loads((model / "config.json").read_text())
    return "bfloat16" in {config.get("dtype"), config.get("torch_dtype")}


def _run_script(script: str, arguments: list[str]) -> None:
    """Run one of llama.cpp's scripts with these command-line arguments."""
    logging.basicConfig(level=logging.INFO)
    errors = _ErrorCollector(logging.ERROR)
    logging.getLogger().addHandler(errors)
    sys.argv = [script, *arguments]
    try:
        runpy.run_module(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            reason = " ".join(errors.messages) or f"it ended with {end.code}"
            raise UnsupportedModel(f"llama.cpp's converter rejects the model: {reason}") from end


class _ErrorCollector(logging.Handler):
    """Collects the errors that a script logs before it exits."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _patch_pre_tokenizer_lookup() -> None:
    """Make the converter accept unknown tokenizers that split text as GPT-2 does.

    llama.cpp identifies tokenizers by a hash, to find out how they split text into words. It stops at an unknown hash.
    """
    base = import_module("conversion.base")
    original = base.TextModel.get_vocab_base_pre

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        try:
            return original(self, tokenizer)
        except NotImplementedError:
            return _pre_tokenizer(json.loads(tokenizer.backend_tokenizer.to_str()))

    base.TextModel.get_vocab_base_pre = get_vocab_base_pre


def _pre_tokenizer(tokenizer: dict[str, Any]) -> str:
    pre_tokenizer, normalizer = tokenizer["pre_tokenizer"] or {}, tokenizer["normalizer"]
    if (
        tokenizer["model"]["type"] == "BPE"
        and pre_tokenizer.get("type") == "ByteLevel"
        and pre_tokenizer.get("use_regex", True)
        and not pre_tokenizer["add_prefix_space"]
        and normalizer is None
    ):
        return GPT2_PRE_TOKENIZER
    raise UnsupportedModel(
        "llama.cpp does not know this tokenizer, and it is not a byte-level BPE that splits text as GPT-2 does (it has "
        f"the pre-tokenizer {pre_tokenizer.get('type')} and the normalizer {(normalizer or {}).get('type')}), so its "
        "GGUF would tokenize text differently."
    )
