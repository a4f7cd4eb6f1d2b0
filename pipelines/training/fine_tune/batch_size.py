"""How many samples fit into one batch: found by trying, and halved when memory runs out after all."""

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
"""An epoch keeps at least so many steps: a model learns by steps, however many samples would fit into one."""
MIN_SPEEDUP = 1.1
"""A batch twice as large must be so much faster per sample, on a processor, to be worth its memory."""
MEMORY_SHARE = 0.7
"""Of the memory that is free, the part that trying may take."""


class OutOfMemory(ForgearrError):
    """There is not enough memory to train this model."""

    code = "OUT_OF_MEMORY"


class RestartWithSmallerBatch(OutOfMemory):
    """One of the processes that train together is out of memory: all must start again with smaller batches."""

    @property
    def batch_settings(self) -> dict[str, int]:
        """What of the place in the training is another one now."""
        return {name: int(str(self.details[name])) for name in ("batch_size", "gradient_accumulation")}


def find_batch_size(trainer: Any, max_size: int) -> int:
    """The batch size to use, at most `most`: on a GPU the largest that fits, else the one where speed stops growing.

    It runs real steps, forward and backward, on the longest samples, and leaves the model as it was. Processes that
    train together all try, and take what suits each of them.
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


def halve(place: Mapping[str, Any]) -> dict[str, int] | None:
    """Half the batch, and twice as many of them to a step: the same training in less memory. None at its end."""
    if place["batch_size"] in {1, "auto"}:
        return None
    return {"batch_size": place["batch_size"] // 2, "gradient_accumulation": place["gradient_accumulation"] * 2}


def is_out_of_memory(error: BaseException) -> bool:
    """On a processor torch tells of it with a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        phrase in str(error).lower() for phrase in ("can't allocate", "cannot allocate")
    )


def free_memory() -> None:
    """Give back what nothing holds any more: Python's garbage, and what the allocators keep for later."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # what was only tried is not what the training takes


def _samples_per_second(trainer: Any, model: Any, rows: list[Any]) -> float:
    """Samples in a second; 0 when they do not fit."""
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
    """Keep what the trainer counts from being gathered: a process that runs out of memory does not come to that."""
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
