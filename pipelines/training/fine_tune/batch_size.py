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

MOST = 64
LEAST_STEPS = 8
"""An epoch keeps at least so many steps: a model learns by steps, however many samples would fit into one."""
LEAST_GAIN = 1.1
"""A batch twice as large must be so much faster per sample, on a processor, to be worth its memory."""
MEMORY_SHARE = 0.7
"""Of the memory that is free, the part that trying may take."""


class OutOfMemory(ForgearrError):
    """There is not enough memory to train this model."""

    code = "OUT_OF_MEMORY"


class StartSmaller(OutOfMemory):
    """One of the processes that train together is out of memory: all must start again with smaller batches."""

    @property
    def place(self) -> dict[str, int]:
        """What of the place in the training is another one now."""
        return {name: int(str(self.details[name])) for name in ("batch_size", "gradient_accumulation")}


def find(trainer: Any, most: int) -> int:
    """The batch size to use, at most `most`: on a GPU the largest that fits, else the one where speed stops growing.

    It runs real steps, forward and backward, on the longest samples, and leaves the model as it was. Processes that
    train together all try, and take what suits each of them.
    """
    rows = sorted(trainer.train_dataset, key=_length, reverse=True)
    device = trainer.accelerator.device
    limit = psutil.virtual_memory().available * MEMORY_SHARE
    best, best_pace, size = 1, 0.0, 1
    model = trainer.model.to(device).train()
    before = psutil.Process().memory_info().rss
    while size <= min(most, MOST, len(rows)):
        pace = _pace(trainer, model, rows[:size])
        taken = psutil.Process().memory_info().rss - before
        is_worth_it = device.type != "cpu" or (pace >= best_pace * LEAST_GAIN and 2 * taken <= limit)
        if not distributed.all_agree(pace > 0 and is_worth_it):
            break
        best, best_pace, size = size, max(pace, best_pace), size * 2
    model.zero_grad(set_to_none=True)
    release()
    return best


def halve(place: Mapping[str, Any]) -> dict[str, int] | None:
    """Half the batch, and twice as many of them to a step: the same training in less memory. None at its end."""
    if place["batch_size"] in {1, "auto"}:
        return None
    return {"batch_size": place["batch_size"] // 2, "gradient_accumulation": place["gradient_accumulation"] * 2}


def is_out_of_memory(error: BaseException) -> bool:
    """On a processor torch tells of it with a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in str(error).lower() for words in ("can't allocate", "cannot allocate")
    )


def release() -> None:
    """Give back what nothing holds any more: Python's garbage, and what the allocators keep for later."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # what was only tried is not what the training takes


def _pace(trainer: Any, model: Any, rows: list[Any]) -> float:
    """Samples in a second; 0 when they do not fit."""
    try:
        with _by_itself(trainer.accelerator):
            _step(trainer, model, rows)  # the first one warms up
            started = time.perf_counter()
            _step(trainer, model, rows)
            return len(rows) / (time.perf_counter() - started)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return 0


@contextmanager
def _by_itself(accelerator: Any) -> Generator[None]:
    """Keep what the trainer counts from being gathered: a process that runs out of memory does not come to that."""
    names = ("gather", "gather_for_metrics")
    for name in names:
        setattr(accelerator, name, _as_it_is)
    try:
        yield
    finally:
        for name in names:
            delattr(accelerator, name)


def _as_it_is(tensor: Any, *_: Any, **__: Any) -> Any:
    return tensor


def _step(trainer: Any, model: Any, rows: list[Any]) -> None:
    inputs = trainer._prepare_inputs(trainer.data_collator(rows))
    with torch.random.fork_rng(), trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(model, inputs)
    loss.backward()
    model.zero_grad(set_to_none=True)


def _length(row: Mapping[str, Any]) -> int:
    return sum(len(value) for value in row.values() if isinstance(value, list))
