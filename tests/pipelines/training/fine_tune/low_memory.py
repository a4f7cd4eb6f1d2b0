"""Trains on long samples in batches of 16, with a limit to the memory that the training itself may add."""

import json
import resource
import sys
from pathlib import Path

import psutil

from pipelines.training.data.samples import Sample
from pipelines.training.fine_tune import recipe
from pipelines.training.spec import FineTuneSpec
from tests.support.training import RecordingObserver


class MemoryLimitingObserver(RecordingObserver):
    def on_phase(self, name: str) -> None:
        super().on_phase(name)
        if name == "training" and self.phases.count(name) == 1:
            # The limit is for data only, because the address space grows with every thread, whatever it uses.
            limit = psutil.Process().memory_info().data + int(sys.argv[3]) * 2**20
            resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))


def main(base: str, folder: Path) -> None:
    text = "one word and another word and " * 60
    messages = [{"role": "user", "content": "Tell me."}, {"role": "assistant", "content": text}]
    samples = [Sample.model_validate({"messages": messages})] * 48
    spec = FineTuneSpec.model_validate({"data": {"dataset": "any"}, "epochs": 1, "batch_size": 16, "eval_split": 0})
    observer = MemoryLimitingObserver(folder / "kept")
    outcome = recipe.train(spec, samples, base=base, work_folder=folder, observer=observer)
    print(json.dumps({"batch_size": outcome.batch_size, "steps": outcome.steps, "warnings": observer.warnings}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
