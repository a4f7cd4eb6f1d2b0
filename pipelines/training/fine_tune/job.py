"""The kind `fine_tune`: runs the recipe as a durable job, in one process or, with Ray Train, in several.

The job's checkpoint in the database is small: the ids of the data, the training state, and the addresses in storage of
the trainer's checkpoints (checkpoints.py). Those hold weights, optimizer, schedule, the position in the data and the
random state.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import storage
from cluster.db import now
from cluster.errors import ForgearrError
from cluster.runtime.processes import lower_priority
from cluster.settings import home
from jobs import outputs
from jobs.context import Context, StopJob
from jobs.execution import workspace
from jobs.registry import Resources, job
from jobs.retention import register_references
from pipelines.training import retention
from pipelines.training.data import datasets, resolution
from pipelines.training.data.datasets import Dataset
from pipelines.training.fine_tune import checkpoints, step_metrics
from pipelines.training.models import base_models, names
from pipelines.training.spec import FineTuneSpec

MODEL_FILES = {".safetensors", ".json", ".jinja", ".model", ".txt"}
TRAINER_FILES = {"trainer_state.json"}
"""Files of a checkpoint that have a model's extension, but belong to the trainer."""

register_references("trainings", retention.find_needed_jobs)

if TYPE_CHECKING:
    from pipelines.training.fine_tune.recipe import TrainingResult


def _resources(spec: FineTuneSpec) -> Resources:
    return Resources(cpus=spec.cpus_per_worker, gpus=spec.gpus_per_worker, labels=spec.labels, workers=spec.workers)


@job("fine_tune", spec=FineTuneSpec, resources=_resources, admin_only=resolution.admin_choice, tracked=True)
def fine_tune(context: Context, spec: FineTuneSpec) -> dict[str, Any]:
    """Fine-tunes a language model on prompts, a dataset or documents."""
    state: dict[str, Any] = dict(context.checkpoint_state or {})
    if "result" not in state:
        result = _train_or_resume(context, spec, state)
        # The processes of the training have recorded more than this one knows.
        state = {**(outputs.own_job(context.job_id).checkpoint or {}), "result": result}
        context.checkpoint(state)  # stored before the trainer's checkpoints are removed
    _remove_from_storage(state.get("checkpoints", {}).values())
    return state["result"]


def _train_or_resume(context: Context, spec: FineTuneSpec, state: dict[str, Any]) -> dict[str, Any]:
    """Train, from the beginning or from this state. The first attempt fixes the data and the base model."""
    from pipelines.training.fine_tune.batch_size import RestartWithSmallerBatch

    if "dataset" not in state:
        names.check_early(context, spec.full_name)
        context.report(progress=0, phase="gathering the data")
        state["dataset"] = resolution.resolve(spec.data, context.owner_id).id
        if spec.validation:
            state["validation"] = resolution.resolve(spec.validation, context.owner_id).id
        state["base_model"] = base_models.pin_reference(spec.base_model, context.owner_id)
        context.checkpoint(state)
    dataset = datasets.get(state["dataset"])
    context.input(dataset.name, dataset.digest, dataset.address, samples=dataset.samples)
    while True:
        checkpoints.require_whole(context, state)
        try:
            return _run_on_ray_train(context, spec, partial(_train, context, spec, dataset, state))
        except RestartWithSmallerBatch as restart:
            context.log(restart.message, "WARNING")
            state = dict(outputs.own_job(context.job_id).checkpoint or {})  # with the smaller batch size


def _run_on_ray_train(context: Context, spec: FineTuneSpec, train_function: Callable[[], Any]) -> Any:
    """Run a function in as many processes as the spec says. One is this process, which has the job's CPUs and GPUs."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    is_single = spec.workers == 1
    scaling = ScalingConfig(
        num_workers=0 if is_single else spec.workers,
        use_gpu=spec.gpus_per_worker > 0,
        resources_per_worker={"CPU": spec.cpus_per_worker, "GPU": spec.gpus_per_worker},
        label_selector=spec.labels or None,
    )
    # Ray Train stores nothing there: checkpoints go to storage, and are recorded under the job's lease.
    run_config = RunConfig(
        name=context.job_id,
        storage_path=str(home() / "cache" / "ray-train"),
        failure_config=FailureConfig(max_failures=0),
    )
    try:
        return TorchTrainer(train_function, scaling_config=scaling, run_config=run_config).fit().return_value
    except TrainingFailedError as failure:
        if context.stop_reason is not None:
            raise StopJob(context.stop_reason) from failure
        raise _original_error(failure) from failure


def _train(context: Context, spec: FineTuneSpec, dataset: Dataset, state: dict[str, Any]) -> dict[str, Any]:
    """Train in one of the processes. The first one publishes the model and returns the result; others return {}."""
    if spec.workers > 1:
        lower_priority()  # as in threads that run jobs
    from pipelines.training.fine_tune.unsloth_model import prefer_unsloth

    prefer_unsloth(spec)
    from pipelines.training.fine_tune import recipe
    from pipelines.training.fine_tune.batch_size import RestartWithSmallerBatch

    with workspace.temporary_folder(context.job_id) as folder:
        observer = JobObserver(context, state, folder, spec.keep_epochs)
        try:
            training_result = recipe.train(
                spec,
                datasets.load(dataset),
                base=base_models.resolve(state["base_model"], context.owner_id),
                work_folder=folder,
                observer=observer,
                validation=datasets.load(datasets.get(state["validation"])) if "validation" in state else None,
                checkpoint=observer.latest_checkpoint(),
                resume_state=state.get("place"),
            )
            if not observer.is_rank_zero:
                return {}
            context.checkpoint(state)  # raises if another worker has taken over the job
            return _publish(context, spec, dataset, state["base_model"], training_result, folder)
        except RestartWithSmallerBatch as restart:
            context.checkpoint({**state, "place": {**state.get("place", {}), **restart.batch_settings}})
            raise
        except Exception as error:
            if workspace.is_disk_full(error, folder):
                raise workspace.disk_full_error(folder, _folder_size(folder), "Saving the training") from error
            raise


def _publish(
    context: Context,
    spec: FineTuneSpec,
    dataset: Dataset,
    base_model: str,
    training_result: "TrainingResult",
    folder: Path,
) -> dict[str, Any]:
    """Store the model, and log its artifacts. Returns the result of the job."""
    from pipelines.training.fine_tune import plots

    model, history = training_result.model, training_result.history
    address = storage.save(model, context.storage_name("model"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if (model / name).exists():
            context.artifact(model / name)
    context.artifact(plots.loss_curve(history, folder / "loss.png"))
    context.artifact(plots.environment(folder / "environment.json"))
    results_file = step_metrics.save_file(history, folder / "step_metrics.csv", outputs.own_job(context.job_id))
    result = dataclasses.asdict(training_result)
    counts = {name: result.pop(name) for name in ("train", "held_out", "truncated", "skipped")}
    for name in ("model", "history"):
        result.pop(name)
    return {
        "name": spec.full_name,
        "base_model": base_model,
        "method": spec.method,
        "tuning": spec.tuning,
        "model": address,
        "model_bytes": _folder_size(model),
        "result_files": [results_file],
        "dataset": {"id": dataset.id, "digest": dataset.digest, "samples": dataset.samples, **counts},
        **result,
    }


class JobObserver:
    """Reports a training to its job, and stores the checkpoints. Only the first process reports."""

    def __init__(self, context: Context, state: dict[str, Any], folder: Path, keep_epochs: int = 0) -> None:
        from ray import train

        self._context = context
        self._state = state
        self._folder = folder
        self._keep_epochs = keep_epochs
        self._stale: set[str] = set()  # addresses of epochs that the next checkpoint does not refer to
        self._saves = 0
        self._rank = train.get_context().get_world_rank()
        self._processes = train.get_context().get_world_size()
        self.is_rank_zero = self._rank == 0

    def on_phase(self, name: str) -> None:
        if self.is_rank_zero:
            self._context.report(phase=name)

    def on_warning(self, message: str) -> None:
        if self.is_rank_zero:
            self._context.log(message, "WARNING")

    def on_step(self, progress: float, values: Mapping[str, float]) -> None:
        self._context.report(progress=progress, phase="training", **values)

    def should_stop(self) -> bool:
        return self.is_rank_zero and self._context.should_stop()

    def save_checkpoint(self, checkpoint: Path, training_state: Mapping[str, Any]) -> None:
        """The first process stores the checkpoint, the others add their random state. Then the job records it."""
        self._saves += 1  # a step may be saved twice: the second time after an evaluation, for example
        name = self._context.storage_name(f"checkpoints/{training_state['step']}-{self._saves}")
        if self.is_rank_zero:
            storage.save(checkpoint, name)
        self._barrier()
        if not self.is_rank_zero:
            random_state = _random_state_file(self._rank)
            storage.save(checkpoint / random_state, f"{name}/{random_state}")
        self._barrier()
        address = storage.address(name)
        added = [_random_state_file(rank) for rank in range(1, self._processes)]
        files = checkpoints.describe(checkpoint, address, added) if self.is_rank_zero else {}
        replaced = checkpoints.add(self._state, address, files, training_state)
        if self.is_rank_zero:
            self._save_state(self._stale | replaced)
            self._stale = set()
        self._barrier()

    def on_epoch(self, checkpoint: Path, metrics: Mapping[str, float]) -> None:
        step = int(metrics["step"])
        name = self._context.storage_name(f"epochs/{step}")
        if self.is_rank_zero:
            for file in sorted(checkpoint.iterdir()):
                if file.suffix in MODEL_FILES and file.name not in TRAINER_FILES:
                    storage.save(file, f"{name}/{file.name}")
            self._context.log(f"Checkpoint created at step {step}")
        saved = {"address": storage.address(name), "created_at": now().isoformat(), **metrics, "step": step}
        previous: list[dict[str, Any]] = [epoch for epoch in self._state.get("epochs", []) if epoch["step"] != step]
        self._state["epochs"] = [*previous, saved][-self._keep_epochs :]
        self._stale |= {epoch["address"] for epoch in previous} - {epoch["address"] for epoch in self._state["epochs"]}

    def load_checkpoint(self, step: int) -> Path:
        return storage.fetch(self._state["checkpoints"][str(step)], self._folder)

    def latest_checkpoint(self) -> Path | None:
        step = self._state.get("place", {}).get("step")
        return None if step is None else self.load_checkpoint(step)

    def _save_state(self, stale: set[str]) -> None:
        try:
            self._context.checkpoint(self._state)
        except StopJob as stop:
            if stop.reason == "pause":  # the state is stored; for other reasons, the row still refers to the old files
                _remove_from_storage(stale)
            raise
        _remove_from_storage(stale)

    def _barrier(self) -> None:
        if self._processes > 1:
            from torch import distributed

            distributed.barrier()


def _random_state_file(rank: int) -> str:
    """The name that the trainer gives the random state of one of several processes."""
    return f"rng_state_{rank}.pth"


def _remove_from_storage(addresses: Iterable[str]) -> None:
    for address in addresses:
        storage.remove(address)


def _folder_size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _original_error(failure: Exception) -> Exception:
    """The error that a process of the training raised, if there is one."""
    errors = [error for error in getattr(failure, "worker_failures", {}).values() if isinstance(error, Exception)]
    originals = [getattr(error, "_base_exc", error) for error in errors]
    # When one process fails, others may fail because it is missing.
    own_errors = [error for error in originals if isinstance(error, ForgearrError)] or originals
    return own_errors[0] if own_errors and isinstance(own_errors[0], Exception) else failure
