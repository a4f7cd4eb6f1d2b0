"""The training that a person would write with TRL alone. `python bare_training.py JSON`: prints when what was done.

It imports nothing of ours, and takes the same data and arguments as the job that it is compared with.
"""

import json
import sys
import time
from typing import Any

wanted = json.loads(sys.argv[1])
moments = {"started": time.time()}

from datasets import load_dataset  # noqa: E402 - how long the imports take is part of what is measured
from peft import LoraConfig  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback  # noqa: E402
from trl.trainer.sft_config import SFTConfig  # noqa: E402
from trl.trainer.sft_trainer import SFTTrainer  # noqa: E402

moments["imported"] = time.time()
steps: list[dict[str, float]] = []


class Clock(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            steps.append({"at": time.time(), "loss": float(logs["loss"])})


data = load_dataset("json", data_files=wanted["data"], split="train", cache_dir=wanted["output"])


def split(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}


data = data.map(split)
arguments = SFTConfig(
    output_dir=wanted["output"],
    max_steps=wanted["steps"],
    per_device_train_batch_size=1,
    learning_rate=2e-4,
    lr_scheduler_type="cosine",
    warmup_steps=0.05,
    loss_type="nll",
    max_length=2048,
    gradient_checkpointing=False,
    bf16=False,
    use_cpu=True,
    dataloader_pin_memory=False,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
)
tokenizer = AutoTokenizer.from_pretrained(wanted["base"])
model = AutoModelForCausalLM.from_pretrained(wanted["base"], dtype="float32")
model.config.use_cache = False
lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
trainer = SFTTrainer(
    model,
    args=arguments,
    processing_class=tokenizer,
    train_dataset=data.select_columns(["prompt", "completion"]),
    peft_config=lora,
    callbacks=[Clock()],
)
trainer.remove_callback(PrinterCallback)
moments["loaded"] = time.time()
trainer.train()
trainer.save_model(wanted["output"] + "/model")
moments["saved"] = time.time()
if trainer.is_world_process_zero():
    print(json.dumps({**moments, "steps": steps}), flush=True)
