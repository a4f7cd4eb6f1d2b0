"""Find the largest useful batch size by trying, and halve it when memory runs out during a training."""

import ctypes
import gc
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from cluster.errors import ForgearrError
from pipelines.training.fine_tune import distributed

MAX_BATCH_SIZE = 64
MIN_STEPS_PER_EPOCH = 8
"""An automatic batch size leaves at least this many steps per epoch: too few steps train badly."""
MIN_SPEEDUP = 1.1
"""On a CPU, a batch of twice the size must be this much faster per sample to be worth its memory."""
MEMORY_SHARE = 0.7
"""The share of the free memory that a trial on a CPU may use."""


class OutOfMemory(ForgearrError):
    """There is not enough memory to train this model."""

    code = "OUT_OF_MEMORY"


class RestartWithSmallerBatch(OutOfMemory):
    """A process of a distributed training is out of memory: all must start again with smaller batches."""

    @property
    def batch_settings(self) -> dict[str, int]:
        """The new values of the training state."""
        return {name: int(str(self.details[name])) for name in ("batch_size", "gradient_accumulation")}


def find_batch_size(trainer: Any, max_size: int) -> int:
    """The batch size to use, up to `max_size`: the largest that fits on a GPU, the fastest that fits on a CPU.

    It runs real steps, forward and backward, on the longest samples, and leaves the model unchanged. In a distributed
    training, all processes try, and use a size that fits in each of them.
    """
    rows = sorted(trainer.train_dataset, key=_length, reverse=True)
    device = trainer.accelerator.device
    limit = psutil.virtual_memory().available * MEMORY_SHARE
    best, best_speed, size = 1, 0.0, 1
    model = trainer.model.to(device).train()
    initial_bytes = psutil.Process().memory_info().rss
    while size <= min(max_size, MAX_BATCH_SIZE, len(rows)):
        speed = _samples_per_second(trainer, model, rows[:size])
        used_bytes = psutil.Process().memory_info().rss - initial_bytes
        is_worth_it = device.type != "cpu" or (speed >= best_speed * MIN_SPEEDUP and 2 * used_bytes <= limit)
        if not distributed.all_reduce_and(speed > 0 and is_worth_it):
            break
        best, best_speed, size = size, max(speed, best_speed), size * 2
    model.zero_grad(set_to_none=True)
    free_memory()
    return best


def halve(training_state: Mapping[str, Any]) -> dict[str, int] | None:
    """Halve the batch and double the batches per step: the same training in less memory. None if that is impossible."""
    size, accumulation = training_state["batch_size"], training_state["gradient_accumulation"]
    if size in {1, "auto"}:
        return None
    return {"batch_size": size // 2, "gradient_accumulation": accumulation * 2}


def is_out_of_memory(error: BaseException) -> bool:
    """On a CPU, torch reports it as a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        phrase in str(error).lower() for phrase in ("can't allocate", "cannot allocate")
    )


def free_memory() -> None:
    """Release unused memory: Python's garbage, and what the allocators cache."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # the peak of a trial is not the training's


def _samples_per_second(trainer: Any, model: Any, rows: list[Any]) -> float:
    """0 if the samples do not fit into memory."""
    try:
        with _without_gathering(trainer.accelerator):
            _trial_step(trainer, model, rows)  # the first one warms up
            started = time.perf_counter()
            _trial_step(trainer, model, rows)
            return len(rows) / (time.perf_counter() - started)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return 0


@contextmanager
def _without_gathering(accelerator: Any) -> Generator[None]:
    """Disable the gathering of metrics: a process that runs out of memory would leave the others waiting in it."""
    names = ("gather", "gather_for_metrics")
    for name in names:
        setattr(accelerator, name, _return_unchanged)
    try:
        yield
    finally:
        for name in names:
            delattr(accelerator, name)


def _return_unchanged(tensor: Any, *_: Any, **__: Any) -> Any:
    return tensor


def _trial_step(trainer: Any, model: Any, rows: list[Any]) -> None:
    inputs = trainer._prepare_inputs(trainer.data_collator(rows))
    with torch.random.fork_rng(), trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(model, inputs)
    loss.backward()
    model.zero_grad(set_to_none=True)


def _length(row: Mapping[str, Any]) -> int:
    return sum(len(value) for value in row.values() if isinstance(value, list))
