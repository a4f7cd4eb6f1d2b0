"""Observers of trainings, and samples for small trainings."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.training.data.samples import Sample
from pipelines.training.spec import FineTuneSpec

SERVICES = ["Sonarr", "Radarr", "Plex"]


class SilentObserver:
    """Ignores the reports of a training, and stores no checkpoints."""

    def on_phase(self, name: str) -> None: ...
    def on_warning(self, message: str) -> None: ...
    def on_step(self, progress: float, values: Mapping[str, float]) -> None: ...
    def should_stop(self) -> bool:
        return False

    def save_checkpoint(self, checkpoint: Path, training_state: Mapping[str, Any]) -> None: ...
    def on_epoch(self, checkpoint: Path, metrics: Mapping[str, float]) -> None: ...
    def load_checkpoint(self, step: int) -> Path:
        raise AssertionError("no checkpoint was stored")


class TrainingInterrupted(BaseException):
    """A BaseException like StopJob, so that no `except Exception` catches it."""


class RecordingObserver:
    """Records what a training reports, and stores its checkpoints in a folder. It may interrupt the training at one."""

    def __init__(self, folder: Path, end_at: int | None = None) -> None:
        self._folder = folder
        self._end_at = end_at
        self.losses: dict[int, float] = {}
        self.values: list[Mapping[str, float]] = []
        self.phases: list[str] = []
        self.warnings: list[str] = []
        self.training_state: dict[str, Any] = {}
        self.stop = False
        self.epochs: list[dict[str, float]] = []

    def on_phase(self, name: str) -> None:
        self.phases.append(name)

    def on_warning(self, message: str) -> None:
        self.warnings.append(message)

    def on_step(self, progress: float, values: Mapping[str, float]) -> None:
        self.values.append({"progress": progress, **values})
        if "loss" in values:
            self.losses[int(values["step"])] = values["loss"]

    def should_stop(self) -> bool:
        return self.stop

    def save_checkpoint(self, checkpoint: Path, training_state: Mapping[str, Any]) -> None:
        self.training_state = json.loads(json.dumps(training_state))
        shutil.copytree(checkpoint, self.load_checkpoint(training_state["step"]), dirs_exist_ok=True)
        if training_state["step"] == self._end_at:
            raise TrainingInterrupted

    def on_epoch(self, checkpoint: Path, metrics: Mapping[str, float]) -> None:
        assert (checkpoint / "adapter_model.safetensors").exists()
        self.epochs.append(dict(metrics))

    def load_checkpoint(self, step: int) -> Path:
        return self._folder / str(step)


def chats(count: int = 24) -> list[Sample]:
    return [
        Sample.model_validate(
            {
                "messages": [
                    {"role": "user", "content": f"Which service is number {number}?"},
                    {"role": "assistant", "content": f"Number {number} is {SERVICES[number % 3]}."},
                ]
            }
        )
        for number in range(count)
    ]


def spec_of(**values: Any) -> FineTuneSpec:
    defaults = {"data": {"dataset": "any"}, "epochs": 3, "learning_rate": 2e-3, "batch_size": 4, "dropout": 0.1}
    return FineTuneSpec.model_validate(defaults | values)
