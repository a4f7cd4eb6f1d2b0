"""The trainer's callback: it reports progress, saves checkpoints and stops a training. An observer receives both."""

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

METRIC_NAMES = {
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
"""The trainer's names of metrics, and ours."""


class TrainingDiverged(ForgearrError):
    """The loss is not finite: the learning rate is too high for this model and data."""

    code = "TRAINING_DIVERGED"


class TrainingObserver(Protocol):
    """Receives the progress of a training, and stores its checkpoints.

    Each process of a distributed training has one. `on_step` is called in the first process only.
    """

    def on_phase(self, name: str) -> None: ...

    def on_warning(self, message: str) -> None: ...

    def on_step(self, progress: float, values: Mapping[str, float]) -> None:
        """A step or an evaluation is done."""
        ...

    def should_stop(self) -> bool:
        """Whether to save a checkpoint now and stop."""
        ...

    def save_checkpoint(self, checkpoint: Path, training_state: Mapping[str, Any]) -> None:
        """Store this checkpoint, whose folder is deleted afterwards. Training resumes from it and `training_state`.

        The newest checkpoint must be kept, and the one of `training_state["best_step"]`.
        """
        ...

    def on_epoch(self, checkpoint: Path, metrics: Mapping[str, float]) -> None:
        """An epoch has ended, with its model in this checkpoint. The next `save_checkpoint` makes it permanent."""
        ...

    def load_checkpoint(self, step: int) -> Path:
        """The folder of a checkpoint that was stored."""
        ...


class ProgressCallback(TrainerCallback):
    def __init__(self, spec: FineTuneSpec, observer: TrainingObserver, training_state: dict[str, Any]) -> None:
        self._spec = spec
        self._observer = observer
        self._training_state = training_state
        self._saved_at = self._started_at = time.monotonic()
        self._start_counts: tuple[int, int] = (0, 0)  # step and tokens
        self._save_due = self._is_epoch_end = False
        self.saved_step: int | None = None

    @property
    def best_step(self) -> int | None:
        return self._training_state.get("best_step")

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._saved_at = self._started_at = time.monotonic()
        self._start_counts = (state.global_step, int(state.num_input_tokens_seen))

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: dict[str, Any] = kwargs["logs"]
        if "loss" in logs and not math.isfinite(logs["loss"]):
            raise TrainingDiverged(
                f"The loss is not finite at step {state.global_step}: choose a lower learning_rate than "
                f"{self._spec.learning_rate:g}."
            )
        if not state.is_world_process_zero or not METRIC_NAMES.keys() & logs.keys():
            return
        values = {name: float(logs[logged_name]) for logged_name, name in METRIC_NAMES.items() if logged_name in logs}
        values |= {"step": state.global_step, "epoch": float(state.epoch or 0)}
        self._observer.on_step(100 * state.global_step / max(1, state.max_steps), values | self._speed_metrics(state))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        is_due = time.monotonic() - self._saved_at > self._spec.checkpoint_minutes * 60
        interval = self._spec.checkpoint_steps
        # All processes must save at the same step.
        stop, save = distributed.broadcast_flags(self._observer.should_stop(), is_due)
        self._save_due = stop or save or bool(interval and state.global_step % interval == 0)
        # At the end of an epoch, on_epoch_end asks for the checkpoint. It is then saved after the evaluation, which a
        # resumed training would otherwise skip.
        if not float(state.epoch or 0).is_integer():
            control.should_save = self._save_due

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._is_epoch_end = bool(self._spec.keep_epochs)
        control.should_save = self._save_due or self._is_epoch_end

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop after `early_stopping` evaluations without an improvement. The best checkpoint becomes the result."""
        loss = self._training_state["eval_loss"] = kwargs["metrics"]["eval_loss"]
        if not self._spec.early_stopping:
            return
        if loss < self._training_state.get("best_loss", math.inf):
            self._training_state |= {"best_loss": loss, "best_step": state.global_step, "worse": 0}
            control.should_save = True
        else:  # also if the first loss is NaN
            worse = self._training_state["worse"] = self._training_state.get("worse", 0) + 1
            control.should_training_stop = worse >= self._spec.early_stopping

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self._is_epoch_end:
            self._observer.on_epoch(checkpoint, _latest_metrics(state))
            self._is_epoch_end = False
        self._observer.save_checkpoint(checkpoint, self._training_state | {"step": state.global_step})
        self.saved_step = state.global_step
        shutil.rmtree(checkpoint, ignore_errors=True)  # all processes on this machine do this
        self._saved_at = time.monotonic()
        self._save_due = False

    def _speed_metrics(self, state: TrainerState) -> dict[str, float]:
        step, tokens = self._start_counts
        seconds = time.monotonic() - self._started_at
        done = state.global_step - step
        metrics: dict[str, float] = {"memory_mb": _memory_mb()}
        if done > 0:
            metrics["tokens_per_second"] = (state.num_input_tokens_seen - tokens) / seconds
            metrics["eta_seconds"] = seconds / done * (state.max_steps - state.global_step)
        if (utilization := _gpu_utilization()) is not None:
            metrics["gpu_utilization"] = utilization
        return metrics


def _latest_metrics(state: TrainerState) -> dict[str, float]:
    """The newest metrics of the training, and those of the evaluation at this step."""
    metrics: dict[str, float] = {}
    for entry in state.log_history:
        if "eval_loss" not in entry or entry["step"] == state.global_step:
            metrics |= {
                name: float(entry[logged_name]) for logged_name, name in METRIC_NAMES.items() if logged_name in entry
            }
    return metrics | {"step": state.global_step, "epoch": float(state.epoch or 0)}


def _memory_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return psutil.Process().memory_info().rss / 2**20


def _gpu_utilization() -> float | None:
    """In percent; None if it is unknown."""
    if not torch.cuda.is_available():
        return None
    try:
        return float(torch.cuda.utilization())
    except (ModuleNotFoundError, RuntimeError):
        return None
