"""What happens around the steps of a training: it is told, saved, stopped, and kept to its limits."""

import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState

from cluster.errors import ForgearrError
from pipelines.training.fine_tune import distributed
from pipelines.training.spec import FineTuneSpec

COLUMNS = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "mean_token_accuracy": "token_accuracy",
    "eval_loss": "eval_loss",
    "eval_mean_token_accuracy": "eval_token_accuracy",
    "rewards/accuracies": "reward_accuracy",
    "eval_rewards/accuracies": "eval_reward_accuracy",
    "rewards/margins": "reward_margin",
}
"""What the trainer logs, and what we call it."""


class TrainingDiverged(ForgearrError):
    """The loss is no number any more: the learning rate is too high for this model and data."""

    code = "TRAINING_DIVERGED"


class Watcher(Protocol):
    """Who wants to know how a training goes. Only the first process of a training speaks to it."""

    def phase(self, name: str) -> None: ...

    def say(self, message: str) -> None: ...

    def step(self, progress: float, values: Mapping[str, float]) -> None:
        """A step is done, or an evaluation."""
        ...

    def should_stop(self) -> bool:
        """Whether to save a checkpoint now and stop."""
        ...

    def keep(self, checkpoint: Path, place: Mapping[str, Any]) -> None:
        """Keep this checkpoint, which is deleted here as soon as this returns. With it and `place`, training goes on.

        The newest one is needed, and the one of `place["best_step"]`.
        """
        ...

    def epoch(self, checkpoint: Path, numbers: Mapping[str, float]) -> None:
        """An epoch has ended, and its model is in this checkpoint. What is done with it counts with the next `keep`."""
        ...

    def kept(self, step: int) -> Path:
        """The checkpoint of this step, which was kept."""
        ...


class Follower(TrainerCallback):
    def __init__(self, spec: FineTuneSpec, watcher: Watcher, place: dict[str, Any]) -> None:
        self._spec = spec
        self._watcher = watcher
        self._place = place
        self._saved_at = self._began = time.monotonic()
        self._began_at: tuple[int, int] = (0, 0)  # step and tokens
        self._save_due = self._epoch_ends = False
        self.saved_step: int | None = None

    @property
    def best_step(self) -> int | None:
        return self._place.get("best_step")

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._saved_at = self._began = time.monotonic()
        self._began_at = (state.global_step, int(state.num_input_tokens_seen))

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **news: Any) -> None:
        logs: dict[str, Any] = news["logs"]
        if "loss" in logs and not math.isfinite(logs["loss"]):
            raise TrainingDiverged(
                f"The loss is no number any more at step {state.global_step}: choose a lower learning_rate than "
                f"{self._spec.learning_rate:g}."
            )
        if not state.is_world_process_zero or not COLUMNS.keys() & logs.keys():
            return
        values = {ours: float(logs[theirs]) for theirs, ours in COLUMNS.items() if theirs in logs}
        values |= {"step": state.global_step, "epoch": float(state.epoch or 0)}
        self._watcher.step(100 * state.global_step / max(1, state.max_steps), values | self._pace(state))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        due = time.monotonic() - self._saved_at > self._spec.checkpoint_minutes * 60
        every = self._spec.checkpoint_steps
        stop, save = distributed.first_says(self._watcher.should_stop(), due)  # all must save at the same step
        self._save_due = stop or save or bool(every and state.global_step % every == 0)
        # What belongs to the end of an epoch, its evaluation above all, must not be lost between save and resume.
        if not float(state.epoch or 0).is_integer():
            control.should_save = self._save_due

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._epoch_ends = bool(self._spec.keep_epochs)
        control.should_save = self._save_due or self._epoch_ends

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **news: Any) -> None:
        """Without an improvement for so many evaluations, it is over, and the best one counts."""
        loss = self._place["eval_loss"] = news["metrics"]["eval_loss"]
        if not self._spec.early_stopping:
            return
        if loss < self._place.get("best_loss", math.inf):
            self._place |= {"best_loss": loss, "best_step": state.global_step, "worse": 0}
            control.should_save = True
        else:
            self._place["worse"] = self._place.get("worse", 0) + 1  # also a first one that is no number
            control.should_training_stop = self._place["worse"] >= self._spec.early_stopping

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self._epoch_ends:
            self._watcher.epoch(checkpoint, _newest(state))
            self._epoch_ends = False
        self._watcher.keep(checkpoint, self._place | {"step": state.global_step})
        self.saved_step = state.global_step
        shutil.rmtree(checkpoint, ignore_errors=True)  # other processes on this machine do the same
        self._saved_at = time.monotonic()
        self._save_due = False

    def _pace(self, state: TrainerState) -> dict[str, float]:
        step, tokens = self._began_at
        seconds = time.monotonic() - self._began
        done = state.global_step - step
        pace: dict[str, float] = {"memory_mb": _memory_mb()}
        if done > 0:
            pace["tokens_per_second"] = (state.num_input_tokens_seen - tokens) / seconds
            pace["eta_seconds"] = seconds / done * (state.max_steps - state.global_step)
        if (use := _gpu_use()) is not None:
            pace["gpu_utilization"] = use
        return pace


def _newest(state: TrainerState) -> dict[str, float]:
    """The newest numbers of the training, and those of its evaluation at this step."""
    numbers: dict[str, float] = {}
    for entry in state.log_history:
        if "eval_loss" not in entry or entry["step"] == state.global_step:
            numbers |= {ours: float(entry[theirs]) for theirs, ours in COLUMNS.items() if theirs in entry}
    return numbers | {"step": state.global_step, "epoch": float(state.epoch or 0)}


def _memory_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return psutil.Process().memory_info().rss / 2**20


def _gpu_use() -> float | None:
    """In percent; None where it cannot be known."""
    if not torch.cuda.is_available():
        return None
    try:
        return float(torch.cuda.utilization())
    except (ModuleNotFoundError, RuntimeError):
        return None
