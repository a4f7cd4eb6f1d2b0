"""The training recipe: samples in, a trained model in a folder out. It needs neither Ray nor Forgearr's database.

    outcome = train(spec, samples, base="meta-llama/Llama-3.2-1B-Instruct", work=Path("work"), watcher=watcher)

Several processes may run it together: it takes part in whatever torch.distributed world it finds itself in. Where
Unsloth is to be used, faster.prefer_unsloth is called before this module is imported.
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
from pipelines.training.data.samples import Pair, Sample
from pipelines.training.fine_tune import batch_size, distributed, unsloth_model
from pipelines.training.fine_tune.callbacks import Follower, Watcher
from pipelines.training.fine_tune.preprocess import (
    HELD_OUT,
    NothingToTrain,
    Numbered,
    Rows,
    context_of,
    length_within,
    prepare,
    require_kind,
    split,
)
from pipelines.training.spec import FineTuneSpec

INITIAL = "initial"
"""Folder of an adapter as it was before the training."""
MOST_EVALUATED = 4
"""How many samples are evaluated at once, where training takes as many."""


class QuantizedBase(UnprocessableRequest):
    """The base model is kept in few bits, and cannot be trained in this way."""

    code = "QUANTIZED_BASE"


@dataclass(frozen=True)
class Outcome:
    model: Path  # an adapter or a whole model, the tokenizer, and the samples that were held out
    steps: int
    epochs: float
    train_loss: float
    eval_loss: float | None
    trained_tokens: int
    batch_size: int
    train: int  # samples that were used, like the next one
    held_out: int
    truncated: int  # of those that were used
    skipped: int
    history: list[dict[str, float]]  # what was logged at each step and each evaluation


def train(
    spec: FineTuneSpec,
    samples: Sequence[Sample] | Sequence[Pair],
    *,
    base: str,
    work: Path,
    watcher: Watcher,
    validation: Sequence[Sample] | Sequence[Pair] | None = None,
    checkpoint: Path | None = None,
    place: Mapping[str, Any] | None = None,
) -> Outcome:
    """Train, or go on from a checkpoint that the watcher was given before, with the place it was told with it.

    What is held out is `validation`, or else a part of the samples.
    """
    disable_progress_bar()  # the watcher tells how it goes
    disable_progress_bars()
    for given in (samples, validation or ()):
        require_kind(given, spec.method)
    _require_trainable(spec, base)
    watcher.phase("reading the samples")
    tokenizer = AutoTokenizer.from_pretrained(base)
    max_length = length_within(spec.max_length, context_of(base, tokenizer))
    if validation is None:
        learned, held_out = split(samples, spec.eval_split, spec.seed)
    else:
        learned, held_out = list(enumerate(samples, 1)), list(enumerate(validation, 1))
    rows = prepare(learned, tokenizer, max_length, spec.long_samples)
    held_out_rows = prepare(held_out, tokenizer, max_length, spec.long_samples)
    if not rows.rows:
        raise NothingToTrain(f"None of {len(learned)} samples fits into {max_length} tokens.")

    followed = dict(place or {"batch_size": spec.batch_size, "gradient_accumulation": spec.gradient_accumulation})

    def build() -> Any:
        return _trainer(spec, base, tokenizer, (rows, held_out_rows), max_length, work, followed)

    trainer, follower = _until_it_fits(spec, build, watcher, checkpoint, followed)
    watcher.phase("saving the model")
    if follower.best_step and follower.best_step < trainer.state.global_step:
        trainer._load_from_checkpoint(str(watcher.kept(follower.best_step)))
    model = _save(trainer, spec, tokenizer, held_out, work)
    return _outcome(trainer, model, followed, rows, held_out_rows)


def _require_trainable(spec: FineTuneSpec, base: str) -> None:
    """A base that is kept in few bits takes an adapter only, and must be unpacked again for an export."""
    quantization = _quantization(base)
    if quantization is None:
        return
    if quantization.get("quant_method") != "bitsandbytes":
        raise QuantizedBase(
            f"{spec.base_model} is kept in few bits by {quantization.get('quant_method')}, which cannot be unpacked "
            "for an export: take the model that it was made from, with tuning: qlora."
        )
    if spec.tuning == "full" or spec.pissa:
        raise QuantizedBase(
            f"{spec.base_model} is kept in few bits, so its own weights cannot be trained: take tuning: qlora, without "
            "pissa, or the model that it was made from."
        )


def _quantization(base: str) -> dict[str, Any] | None:
    return AutoConfig.from_pretrained(base).to_dict().get("quantization_config")


def _until_it_fits(
    spec: FineTuneSpec, build: Callable[[], Any], watcher: Watcher, checkpoint: Path | None, followed: dict[str, Any]
) -> tuple[Any, Follower]:
    """Train in batches that fit into the memory; `followed` is the place in the training, and goes on with it."""
    while True:
        follower = Follower(spec, watcher, followed)
        trainer: Any = None
        try:
            watcher.phase("loading the model")
            trainer = build()
            if followed["batch_size"] == "auto":
                watcher.phase("finding the batch size")
                _take_batches_of(
                    trainer, batch_size.find(trainer, len(trainer.train_dataset) // batch_size.LEAST_STEPS)
                )
                followed["batch_size"] = trainer.args.per_device_train_batch_size
            trainer.add_callback(follower)
            watcher.phase("training")
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            return trainer, follower
        except (MemoryError, RuntimeError) as error:
            if not batch_size.is_out_of_memory(error):
                raise
            smaller = batch_size.halve(followed)
            if trainer is None or smaller is None:
                raise batch_size.OutOfMemory(
                    f"There is not enough memory to train {spec.base_model}, not even on one sample at a time. Take a "
                    "smaller base model, tuning: qlora, a lower rank, a shorter max_length, or a larger machine."
                ) from error
            step = trainer.state.global_step
            news = (
                f"Out of memory at step {step}. Going on with batches of {smaller['batch_size']}, "
                f"{smaller['gradient_accumulation']} to a step."
            )
            if (
                distributed.is_several()
            ):  # the others wait for this one in the middle of a step, and cannot go back alone
                raise batch_size.StartSmaller(news, details=smaller) from error
            followed |= smaller
            watcher.say(news)
            checkpoint = watcher.kept(follower.saved_step) if follower.saved_step else checkpoint
        del trainer, follower
        batch_size.release()


def _take_batches_of(trainer: Any, size: int) -> None:
    trainer.args.per_device_train_batch_size = trainer._train_batch_size = size
    trainer.args.per_device_eval_batch_size = min(MOST_EVALUATED, size)


def _outcome(trainer: Any, model: Path, followed: Mapping[str, Any], rows: Rows, held_out_rows: Rows) -> Outcome:
    history = [{name: float(value) for name, value in entry.items()} for entry in trainer.state.log_history]
    return Outcome(
        model=model,
        steps=trainer.state.global_step,
        epochs=round(float(trainer.state.epoch or 0), 4),
        train_loss=[entry["loss"] for entry in history if "loss" in entry][-1],
        eval_loss=followed.get("best_loss", followed.get("eval_loss")),
        trained_tokens=int(trainer.state.num_input_tokens_seen),
        batch_size=int(followed["batch_size"]),
        train=rows.samples,
        held_out=held_out_rows.samples,
        truncated=rows.truncated + held_out_rows.truncated,
        skipped=rows.skipped + held_out_rows.skipped,
        history=history,
    )


def _trainer(
    spec: FineTuneSpec,
    base: str,
    tokenizer: Any,
    rows: tuple[Rows, Rows],
    max_length: int,
    work: Path,
    place: Mapping[str, Any],
) -> Any:
    """TRL's trainer for this spec."""
    set_seed(spec.seed)
    train_rows, held_out_rows = rows
    batch_size = 1 if place["batch_size"] == "auto" else place["batch_size"]
    cuda = torch.cuda.is_available()
    evaluates = bool(held_out_rows.rows)
    options: dict[str, Any] = {
        "output_dir": str(work / "run"),
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": min(MOST_EVALUATED, batch_size),
        "gradient_accumulation_steps": place["gradient_accumulation"],
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
        "gradient_checkpointing": cuda,  # memory is what a GPU lacks, time what a processor lacks
        "eval_strategy": "no" if not evaluates else "steps" if spec.eval_steps else "epoch",
        "eval_steps": spec.eval_steps,
        "save_strategy": "no",  # the follower says when
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # a loss that is no number ends the training
        "include_num_input_tokens_seen": "non_padding",
        "report_to": [],
        "disable_tqdm": True,
    }
    datasets: dict[str, Any] = {
        "train_dataset": Dataset.from_list(train_rows.rows),
        "eval_dataset": Dataset.from_list(held_out_rows.rows) if evaluates else None,
    }
    model, adapter = _model(spec, base, max_length)
    trainer: Any
    if spec.method == "dpo":
        arguments = DPOConfig(**options, beta=spec.beta)
        trainer = DPOTrainer(model, args=arguments, processing_class=tokenizer, peft_config=adapter, **datasets)
    else:
        arguments = SFTConfig(**options, packing=spec.packing, eval_packing=False, loss_type="nll")
        trainer = SFTTrainer(model, args=arguments, processing_class=tokenizer, peft_config=adapter, **datasets)
    trainer.remove_callback(PrinterCallback)
    if spec.pissa and trainer.is_world_process_zero():
        trainer.model.save_pretrained(work / INITIAL)
    return trainer


def _model(spec: FineTuneSpec, base: str, max_length: int) -> tuple[Any, LoraConfig | None]:
    """The base model, and the adapter to put on it: none when all of it is trained, or when it carries one already."""
    cuda = torch.cuda.is_available()
    if unsloth_model.is_for(spec):
        return unsloth_model.load(spec, base, max_length), None
    is_in_bits = _quantization(base) is not None
    options: dict[str, Any] = {}
    if spec.tuning == "qlora" and not is_in_bits:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if cuda else torch.float32,
        )
    model = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=torch.bfloat16 if cuda else torch.float32,
        device_map={"": torch.cuda.current_device()} if cuda and (spec.tuning == "qlora" or is_in_bits) else None,
        **options,
    )
    model.config.use_cache = False
    if spec.tuning == "full":
        return model, None
    if spec.tuning == "qlora" or is_in_bits:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=cuda)
        if not cuda:
            _stay_trainable(model)
    adapter = LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.rank,
        lora_alpha=spec.alpha or 2 * spec.rank,
        lora_dropout=spec.dropout,
        target_modules=spec.target_modules,
        init_lora_weights="pissa" if spec.pissa else True,
    )
    return model, adapter


def _stay_trainable(model: Any) -> None:
    """On some processors, bitsandbytes repacks weights at the first evaluation, and then passes no gradient on."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _save(trainer: Any, spec: FineTuneSpec, tokenizer: Any, held_out: Sequence[Numbered], work: Path) -> Path:
    folder = work / "model"
    if not trainer.is_world_process_zero():
        return folder
    model = trainer.accelerator.unwrap_model(trainer.model)
    # PiSSA has changed the base's weights. What is saved is the difference to the base as everybody knows it; PEFT
    # warns of the second adapter that it loads to find that.
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        options = {"path_initial_model_for_weight_conversion": work / INITIAL} if spec.pissa else {}
        model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    lines = [_told(sample).model_dump_json(exclude_none=True) for _, sample in held_out]
    (folder / HELD_OUT).write_text("".join(f"{line}\n" for line in lines))
    return folder


def _told(sample: Sample | Pair) -> Sample:
    """A pair as the conversation that is preferred."""
    if isinstance(sample, Sample):
        return sample
    return Sample(messages=[*sample.messages, *sample.chosen], tools=sample.tools)
