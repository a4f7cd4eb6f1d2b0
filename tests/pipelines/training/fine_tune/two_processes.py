"""One of two processes that train together. The second has memory for batches of two, later of one."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from pipelines.training.fine_tune import batch_size, recipe
from tests.support.training import RecordingObserver, chats, spec_of


def _save_nothing(*_: Any) -> None: ...


def main(base: str, folder: Path) -> None:
    rank = int(os.environ["RANK"])
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    step: Any = vars(batch_size)["_trial_step"]

    def scarce_step(trainer: Any, model: Any, rows: list[Any]) -> None:
        if rank == 1 and len(rows) > 2:
            raise MemoryError
        step(trainer, model, rows)

    sizes: list[int] = []

    def no_training(self: Any, **_: Any) -> None:
        sizes.append(self.args.per_device_train_batch_size)
        if rank == 1:
            raise MemoryError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_size, "_trial_step", scarce_step)
        patch.setattr(batch_size, "MIN_SPEEDUP", 0)
        patch.setattr(recipe.SFTTrainer, "train", no_training)
        patch.setattr(recipe, "_save_model", _save_nothing)
        patch.setattr(recipe, "_build_result", _save_nothing)
        refused = None
        try:
            spec = spec_of(batch_size="auto", eval_split=0)
            recipe.train(spec, chats(40), base=base, work_folder=folder / str(rank), observer=RecordingObserver(folder))
        except batch_size.RestartWithSmallerBatch as smaller:
            refused = smaller.batch_settings
    print(json.dumps({"batch_size": sizes[0], "refused": refused}))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
