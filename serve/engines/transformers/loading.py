"""Loads a model folder with transformers, and starts its continuous batching."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessorList,
)

from cluster.settings import EngineSettings
from serve.engines.transformers.memory import BATCH_TOKENS, BLOCK_TOKENS, TransformersFiles, block_count
from serve.engines.transformers.sampling import Sampler


def load_model(files: TransformersFiles, settings: EngineSettings) -> Any:
    cuda = torch.cuda.is_available() and settings.gpu_layers != 0
    options: dict[str, Any] = {}
    if settings.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype(settings),
        )
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        files.model,
        use_safetensors=True,  # pickles run code
        dtype=compute_dtype(settings),
        device_map={"": 0} if cuda else None,
        **options,
    )
    if files.adapter is not None:
        peft_model: Any = PeftModel.from_pretrained(loaded, str(files.adapter))
        # To merge into 4-bit weights would lose precision.
        is_unquantized = getattr(loaded, "hf_quantizer", None) is None
        loaded = peft_model.merge_and_unload(safe_merge=True) if is_unquantized else peft_model.get_base_model()
    return loaded.eval()


def compute_dtype(settings: EngineSettings) -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() and settings.gpu_layers != 0 else torch.float32


def start_batching(model: Any, sampler: Sampler, context: int, settings: EngineSettings) -> Any:
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(
            block_size=BLOCK_TOKENS,
            num_blocks=block_count(context, settings.slots),
            max_batch_tokens=BATCH_TOKENS,
            max_requests_per_batch=settings.slots,
            # The sampler is Python code that needs the scores of one step after the other.
            use_async_batching=False,
            use_cuda_graph=False,
        ),
    )
    processors = manager.logit_processor
    processors.logits_processor = LogitsProcessorList([sampler])  # pyright: ignore[reportArgumentType]
    processors.tensors_required, processors.do_processing = 1, True
    manager.warmup()
    return manager


def tokenizer_folder(files: TransformersFiles) -> Path:
    adapter = files.adapter
    return adapter if adapter is not None and (adapter / "tokenizer_config.json").exists() else files.model
