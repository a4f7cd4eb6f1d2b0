"""The training recipe: train a model on samples, and write it to a folder. It needs neither Ray nor the database.

    result = train(spec, samples, base="Qwen/Qwen2.5-0.5B-Instruct", work_folder=Path("work"), observer=observer)

Several processes may run it together, as a process group of torch.distributed. To use Unsloth, call
unsloth_model.prefer_unsloth before you import this module.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, prepare_model_for_kbit_training
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PrinterCallback, set_seed
from transformers.utils.logging import disable_progress_bar
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from cluster.errors import UnprocessableRequest
from pipelines.training.data.samples import PreferencePair, Sample
from pipelines.training.fine_tune import batch_size, distributed, unsloth_model
from pipelines.training.fine_tune.callbacks import ProgressCallback, TrainingObserver
from pipelines.training.fine_tune.preprocess import (
    HELD_OUT_FILE,
    NothingToTrain,
    NumberedSample,
    PreparedRows,
    context_length,
    prepare,
    require_kind,
    resolve_max_length,
    split,
)
from pipelines.training.models.remote_code import forget_code
from pipelines.training.spec import FineTuneSpec

INITIAL_ADAPTER = "initial"
"""The folder of a PiSSA adapter as it was before the training."""
MAX_EVAL_BATCH_SIZE = 4
"""An evaluation uses the batch size of the training, up to this."""


class QuantizedBase(UnprocessableRequest):
    """The base model is quantized, and cannot be trained in this way."""

    code = "QUANTIZED_BASE"


@dataclass(frozen=True)
class TrainingResult:
    model: Path  # a folder: an adapter or a whole model, the tokenizer, and the held-out samples
    steps: int
    epochs: float
    train_loss: float
    eval_loss: float | None
    trained_tokens: int
    batch_size: int
    train: int  # samples trained on
    held_out: int
    truncated: int  # of `train` and `held_out`
    skipped: int  # in neither of them
    history: list[dict[str, float]]  # the metrics of each step and each evaluation


def train(
    spec: FineTuneSpec,
    samples: Sequence[Sample] | Sequence[PreferencePair],
    *,
    base: str,
    work_folder: Path,
    observer: TrainingObserver,
    validation: Sequence[Sample] | Sequence[PreferencePair] | None = None,
    checkpoint: Path | None = None,
    resume_state: Mapping[str, Any] | None = None,
) -> TrainingResult:
    """Train, or resume from a checkpoint and the training state that `observer.save_checkpoint` received with it.

    The held-out samples are `validation`, or else a part of `samples`.
    """
    disable_progress_bar()  # the observer reports progress
    disable_progress_bars()
    for sample_set in (samples, validation or ()):
        require_kind(sample_set, spec.method)
    _require_trainable(spec, base)
    observer.on_phase("reading the samples")
    tokenizer = AutoTokenizer.from_pretrained(base)
    max_length = resolve_max_length(spec.max_length, context_length(base, tokenizer))
    if validation is None:
        train_samples, held_out = split(samples, spec.eval_split, spec.seed)
    else:
        train_samples, held_out = list(enumerate(samples, 1)), list(enumerate(validation, 1))
    rows = prepare(train_samples, tokenizer, max_length, spec.long_samples)
    held_out_rows = prepare(held_out, tokenizer, max_length, spec.long_samples)
    if not rows.rows:
        raise NothingToTrain(f"None of {len(train_samples)} samples fits into {max_length} tokens.")

    training_state = dict(
        resume_state or {"batch_size": spec.batch_size, "gradient_accumulation": spec.gradient_accumulation}
    )

    def build_trainer() -> Any:
        return _build_trainer(spec, base, tokenizer, (rows, held_out_rows), max_length, work_folder, training_state)

    trainer, callback = _train_with_oom_retry(spec, build_trainer, observer, checkpoint, training_state)
    observer.on_phase("saving the model")
    if callback.best_step and callback.best_step < trainer.state.global_step:
        trainer._load_from_checkpoint(str(observer.load_checkpoint(callback.best_step)))
    model = _save_model(trainer, spec, tokenizer, held_out, work_folder)
    return _build_result(trainer, model, training_state, rows, held_out_rows)


def _require_trainable(spec: FineTuneSpec, base: str) -> None:
    """Refuse a quantized base that cannot be trained as the spec says, or not be dequantized for an export."""
    quantization = _quantization_config(base)
    if quantization is None:
        return
    if quantization.get("quant_method") != "bitsandbytes":
        raise QuantizedBase(
            f"{spec.base_model} is quantized by {quantization.get('quant_method')}, which cannot be dequantized for an "
            "export: use the model that it was made from, with tuning: qlora."
        )
    if spec.tuning == "full" or spec.pissa:
        raise QuantizedBase(
            f"{spec.base_model} is quantized, so its own weights cannot be trained: use tuning: qlora without pissa, "
            "or the model that it was made from."
        )


def _quantization_config(base: str) -> dict[str, Any] | None:
    return AutoConfig.from_pretrained(base).to_dict().get("quantization_config")


def _train_with_oom_retry(
    spec: FineTuneSpec,
    build_trainer: Callable[[], Any],
    observer: TrainingObserver,
    checkpoint: Path | None,
    training_state: dict[str, Any],
) -> tuple[Any, ProgressCallback]:
    """Train in batches that fit into memory. When memory runs out, halve them in `training_state`, and resume."""
    while True:
        callback = ProgressCallback(spec, observer, training_state)
        trainer: Any = None
        try:
            observer.on_phase("loading the model")
            trainer = build_trainer()
            if training_state["batch_size"] == "auto":
                observer.on_phase("finding the batch size")
                _set_batch_size(
                    trainer,
                    batch_size.find_batch_size(trainer, len(trainer.train_dataset) // batch_size.MIN_STEPS_PER_EPOCH),
                )
                training_state["batch_size"] = trainer.args.per_device_train_batch_size
            trainer.add_callback(callback)
            observer.on_phase("training")
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            return trainer, callback
        except (MemoryError, RuntimeError) as error:
            if not batch_size.is_out_of_memory(error):
                raise
            smaller_batches = batch_size.halve(training_state)
            if trainer is None or smaller_batches is None:
                raise batch_size.OutOfMemory(
                    f"There is not enough memory to train {spec.base_model}, even with a batch size of 1. Use a "
                    "smaller base model, tuning: qlora, a lower rank, a shorter max_length, or a larger machine."
                ) from error
            step = trainer.state.global_step
            message = (
                f"Out of memory at step {step}. Continuing with batches of {smaller_batches['batch_size']}, "
                f"{smaller_batches['gradient_accumulation']} per step."
            )
            # The other processes wait in the middle of this step, and can only be restarted.
            if distributed.is_distributed():
                raise batch_size.RestartWithSmallerBatch(message, details=smaller_batches) from error
            training_state |= smaller_batches
            observer.on_warning(message)
            checkpoint = observer.load_checkpoint(callback.saved_step) if callback.saved_step else checkpoint
        del trainer, callback
        batch_size.free_memory()


def _set_batch_size(trainer: Any, size: int) -> None:
    trainer.args.per_device_train_batch_size = trainer._train_batch_size = size
    trainer.args.per_device_eval_batch_size = min(MAX_EVAL_BATCH_SIZE, size)


def _build_result(
    trainer: Any, model: Path, training_state: Mapping[str, Any], rows: PreparedRows, held_out_rows: PreparedRows
) -> TrainingResult:
    history = [{name: float(value) for name, value in entry.items()} for entry in trainer.state.log_history]
    return TrainingResult(
        model=model,
        steps=trainer.state.global_step,
        epochs=round(float(trainer.state.epoch or 0), 4),
        train_loss=[entry["loss"] for entry in history if "loss" in entry][-1],
        eval_loss=training_state.get("best_loss", training_state.get("eval_loss")),
        trained_tokens=int(trainer.state.num_input_tokens_seen),
        batch_size=int(training_state["batch_size"]),
        train=rows.samples,
        held_out=held_out_rows.samples,
        truncated=rows.truncated + held_out_rows.truncated,
        skipped=rows.skipped + held_out_rows.skipped,
        history=history,
    )


def _build_trainer(
    spec: FineTuneSpec,
    base: str,
    tokenizer: Any,
    rows: tuple[PreparedRows, PreparedRows],
    max_length: int,
    work_folder: Path,
    training_state: Mapping[str, Any],
) -> Any:
    set_seed(spec.seed)
    train_rows, held_out_rows = rows
    batch_size = 1 if training_state["batch_size"] == "auto" else training_state["batch_size"]
    cuda = torch.cuda.is_available()
    has_eval = bool(held_out_rows.rows)
    options: dict[str, Any] = {
        "output_dir": str(work_folder / "run"),
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": min(MAX_EVAL_BATCH_SIZE, batch_size),
        "gradient_accumulation_steps": training_state["gradient_accumulation"],
        "num_train_epochs": spec.epochs,
        "max_steps": spec.max_steps or -1,
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": spec.schedule,
        "warmup_steps": spec.warmup,
        "weight_decay": spec.weight_decay,
        "seed": spec.seed,
        "data_seed": spec.seed,
        "max_length": max_length,
        "bf16": cuda and torch.cuda.is_bf16_supported(),
        "use_cpu": not cuda,
        "dataloader_pin_memory": cuda,
        "gradient_checkpointing": cuda,  # it saves memory, which a GPU lacks, and costs time, which a CPU lacks
        "eval_strategy": "no" if not has_eval else "steps" if spec.eval_steps else "epoch",
        "eval_steps": spec.eval_steps,
        "save_strategy": "no",  # ProgressCallback decides when
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # ProgressCallback must see a NaN, to end the training
        "include_num_input_tokens_seen": "non_padding",
        "report_to": [],
        "disable_tqdm": True,
    }
    datasets: dict[str, Any] = {
        "train_dataset": Dataset.from_list(train_rows.rows),
        "eval_dataset": Dataset.from_list(held_out_rows.rows) if has_eval else None,
    }
    model, adapter = _load_model(spec, base, max_length)
    trainer: Any
    if spec.method == "dpo":
        arguments = DPOConfig(**options, beta=spec.beta)
        trainer = DPOTrainer(model, args=arguments, processing_class=tokenizer, peft_config=adapter, **datasets)
    else:
        arguments = SFTConfig(**options, packing=spec.packing, eval_packing=False, loss_type="nll")
        trainer = SFTTrainer(model, args=arguments, processing_class=tokenizer, peft_config=adapter, **datasets)
    trainer.remove_callback(PrinterCallback)
    if spec.pissa and trainer.is_world_process_zero():
        trainer.model.save_pretrained(work_folder / INITIAL_ADAPTER)
    return trainer


def _load_model(spec: FineTuneSpec, base: str, max_length: int) -> tuple[Any, LoraConfig | None]:
    """The base model, and the adapter to add to it: None if all weights are trained, or if Unsloth has added it."""
    cuda = torch.cuda.is_available()
    if unsloth_model.uses_unsloth(spec):
        return unsloth_model.load(spec, base, max_length), None
    is_quantized = _quantization_config(base) is not None
    options: dict[str, Any] = {}
    if spec.tuning == "qlora" and not is_quantized:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if cuda else torch.float32,
        )
    model = AutoModelForCausalLM.from_pretrained(
        base,
        use_safetensors=True,  # pickles run code
        dtype=torch.bfloat16 if cuda else torch.float32,
        device_map={"": torch.cuda.current_device()} if cuda and (spec.tuning == "qlora" or is_quantized) else None,
        **options,
    )
    model.config.use_cache = False
    if spec.tuning == "full":
        return model, None
    if spec.tuning == "qlora" or is_quantized:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=cuda)
        if not cuda:
            _disable_weight_repacking(model)
    adapter = LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.rank,
        lora_alpha=spec.alpha or 2 * spec.rank,
        lora_dropout=spec.dropout,
        target_modules=spec.target_modules,
        init_lora_weights="pissa" if spec.pissa else True,
    )
    return model, adapter


def _disable_weight_repacking(model: Any) -> None:
    """On some CPUs, bitsandbytes repacks weights at the first evaluation, and from then on computes no gradients."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _save_model(
    trainer: Any, spec: FineTuneSpec, tokenizer: Any, held_out: Sequence[NumberedSample], work_folder: Path
) -> Path:
    folder = work_folder / "model"
    if not trainer.is_world_process_zero():
        return folder
    model = trainer.accelerator.unwrap_model(trainer.model)
    # PiSSA changes the base's weights, so the adapter is saved as the difference to the original base. For that, PEFT
    # loads a second adapter, and warns of it.
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        options = {"path_initial_model_for_weight_conversion": work_folder / INITIAL_ADAPTER} if spec.pissa else {}
        model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    forget_code(folder)
    lines = [_to_conversation(sample).model_dump_json(exclude_none=True) for _, sample in held_out]
    (folder / HELD_OUT_FILE).write_text("".join(f"{line}\n" for line in lines))
    return folder


def _to_conversation(sample: Sample | PreferencePair) -> Sample:
    """A pair as a conversation with its chosen answer."""
    if isinstance(sample, Sample):
        return sample
    return Sample(messages=[*sample.messages, *sample.chosen], tools=sample.tools)
