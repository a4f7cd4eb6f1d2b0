"""The training recipe, with forgearr/tiny and without Ray: training, resuming, and refused data."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from pydantic import ValidationError

from cluster import storage
from pipelines.training.data.samples import PreferencePair, Sample
from pipelines.training.models import tiny
from pipelines.training.spec import FineTuneSpec, ForgeSpec
from tests.support.training import RecordingObserver, TrainingInterrupted, chats, spec_of
from tests.support.waiting import TIMEOUT


@pytest.fixture
def base(home: Path) -> str:
    return str(tiny.model_folder())


def train(
    spec: FineTuneSpec, base: str, work: Path, observer: RecordingObserver, samples: Any = None, **resume: Any
) -> Any:
    from pipelines.training.fine_tune import recipe

    work.mkdir(exist_ok=True)
    return recipe.train(spec, samples or chats(), base=base, work_folder=work, observer=observer, **resume)


@pytest.mark.parametrize(
    ("values", "step"),
    [
        pytest.param({"tuning": "lora"}, 4, marks=pytest.mark.deep),  # within an epoch
        ({"tuning": "lora"}, 6),  # at the end of an epoch
        pytest.param({"tuning": "full", "gradient_accumulation": 2}, 4, marks=pytest.mark.deep),
    ],
)
def test_an_interrupted_training_resumes_with_the_same_results(
    base: str, tmp_path: Path, values: dict[str, Any], step: int
) -> None:
    spec = spec_of(checkpoint_steps=step, **values)
    uninterrupted = RecordingObserver(tmp_path / "kept")
    expected = train(spec, base, tmp_path / "whole", uninterrupted)

    first = RecordingObserver(tmp_path / "kept", end_at=step)
    with pytest.raises(TrainingInterrupted):
        train(spec, base, tmp_path / "first", first)
    second = RecordingObserver(tmp_path / "kept")
    outcome = train(
        spec,
        base,
        tmp_path / "second",
        second,
        checkpoint=first.load_checkpoint(step),
        resume_state=first.training_state,
    )

    assert max(first.losses) == step
    assert min(second.losses) == step + 1  # nothing is trained twice
    assert first.losses | second.losses == uninterrupted.losses
    assert (outcome.eval_loss, outcome.trained_tokens) == (expected.eval_loss, expected.trained_tokens)
    assert [entry["step"] for entry in outcome.history] == [entry["step"] for entry in expected.history]


def test_a_training_reduces_the_loss_and_reports_progress(base: str, tmp_path: Path) -> None:
    observer = RecordingObserver(tmp_path / "kept")
    outcome = train(spec_of(tuning="full", epochs=6), base, tmp_path / "work", observer)
    assert (outcome.train, outcome.held_out, outcome.steps) == (22, 2, 36)
    assert outcome.train_loss < min(3, observer.losses[1] / 2)
    last = [values for values in observer.values if "loss" in values][-1]
    expected = {"progress", "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_mb"}
    assert expected | {"eta_seconds"} <= last.keys()
    assert (last["progress"], last["eta_seconds"]) == (100, 0)
    assert observer.phases[-2:] == ["training", "saving the model"]
    held_out = (outcome.model / "held_out.jsonl").read_text().splitlines()
    assert len(held_out) == 2
    assert {Sample.model_validate_json(line).model_dump_json() for line in held_out} <= {
        sample.model_dump_json() for sample in chats()
    }


@pytest.mark.deep
def test_a_pissa_adapter_works_on_the_original_base_model(base: str, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    outcome = train(spec_of(pissa=True, rank=8), base, tmp_path / "work", RecordingObserver(tmp_path / "kept"))
    adapter = json.loads((outcome.model / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["init_lora_weights"]) == (16, True)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    tuned = PeftModel.from_pretrained(model, str(outcome.model))
    tokenizer = AutoTokenizer.from_pretrained(str(outcome.model))
    line = (outcome.model / "held_out.jsonl").read_text().splitlines()[0]
    from pipelines.training.fine_tune.tokenize import encode

    (encoding,) = encode(tokenizer, json.loads(line)["messages"])
    with torch.no_grad():
        tokens = torch.tensor([encoding.input_ids])
        loss = tuned(input_ids=tokens, labels=torch.tensor([encoding.labels])).loss
    assert outcome.eval_loss is not None
    assert abs(float(loss) - outcome.eval_loss) < 0.5


def test_preference_training_raises_the_reward_margin(base: str, tmp_path: Path) -> None:
    observer = RecordingObserver(tmp_path / "kept")
    outcome = train(spec_of(method="dpo", epochs=3), base, tmp_path / "work", observer, preferences())
    margins = [values["reward_margin"] for values in observer.values if "reward_margin" in values]
    assert margins[0] == pytest.approx(0, abs=0.01)
    assert margins[-1] > 0.1
    (held_out,) = (outcome.model / "held_out.jsonl").read_text().splitlines()
    assert json.loads(held_out)["messages"][-1]["content"] == "No, ask first."


@pytest.mark.deep
def test_qlora_and_packing_train_on_a_cpu(base: str, tmp_path: Path) -> None:
    observer = RecordingObserver(tmp_path / "kept")
    outcome = train(spec_of(tuning="qlora", packing=True, max_length=128), base, tmp_path / "work", observer)
    unpacked = train(spec_of(max_length=128), base, tmp_path / "alone", RecordingObserver(tmp_path / "kept"))
    assert outcome.steps < unpacked.steps  # several samples per row
    assert outcome.train_loss < observer.losses[1]


@pytest.mark.deep
def test_early_stopping_keeps_the_best_checkpoint(base: str, tmp_path: Path) -> None:
    observer = RecordingObserver(tmp_path / "kept")
    outcome = train(
        spec_of(tuning="full", epochs=50, learning_rate=0.01, early_stopping=2), base, tmp_path / "work", observer
    )
    evaluations = [values["eval_loss"] for values in observer.values if "eval_loss" in values]
    assert outcome.eval_loss == min(evaluations)
    assert len(evaluations) < 50
    assert evaluations.index(min(evaluations)) == len(evaluations) - 3
    # The saved weights are those of the best evaluation, not the last ones.
    from safetensors.torch import load_file

    best = load_file(observer.load_checkpoint(observer.training_state["best_step"]) / "model.safetensors")
    saved = load_file(outcome.model / "model.safetensors")
    assert all(bool((best[name] == saved[name]).all()) for name in saved)


@pytest.mark.parametrize(
    ("long_samples", "counts"), [("truncate", {"truncated": 2, "skipped": 0}), ("skip", {"truncated": 0, "skipped": 2})]
)
def test_long_samples_are_truncated_or_skipped_and_counted(
    base: str, tmp_path: Path, long_samples: str, counts: dict[str, int]
) -> None:
    samples = [*chats(10), *long_chats(2)]
    spec = spec_of(epochs=1, max_length=64, long_samples=long_samples, eval_split=0)
    outcome = train(spec, base, tmp_path / "work", RecordingObserver(tmp_path / "kept"), samples)
    assert {name: getattr(outcome, name) for name in counts} == counts
    assert outcome.train == 12 - outcome.skipped


def test_a_long_sample_is_refused_by_its_number(base: str, tmp_path: Path) -> None:
    from pipelines.training.fine_tune.preprocess import SampleTooLong

    with pytest.raises(SampleTooLong, match=r"Sample 11 has \d+ tokens, and 64 are allowed"):
        train(
            spec_of(max_length=64, eval_split=0),
            base,
            tmp_path / "work",
            RecordingObserver(tmp_path),
            [*chats(10), *long_chats(1)],
        )


def test_data_without_a_sample_that_fits_is_refused(base: str, tmp_path: Path) -> None:
    from pipelines.training.fine_tune.preprocess import NothingToTrain

    spec = spec_of(max_length=16, long_samples="skip", eval_split=0)
    with pytest.raises(NothingToTrain, match="None of 2 samples fits into 16 tokens"):
        train(spec, base, tmp_path / "work", RecordingObserver(tmp_path), long_chats(2))


def test_data_that_does_not_suit_the_model_or_the_method_is_refused(base: str, tmp_path: Path) -> None:
    from pipelines.training.data.parsing import WrongKindOfData
    from pipelines.training.fine_tune.preprocess import LengthBeyondContext
    from pipelines.training.fine_tune.tokenize import UnusableTokenizer

    def train_with(base: str = base, samples: Any = None, **values: Any) -> None:
        train(spec_of(**values), base, tmp_path / "work", RecordingObserver(tmp_path), samples)

    with pytest.raises(LengthBeyondContext, match=r"max_length is 4096, and the model's context is \d+ tokens"):
        train_with(max_length=4096)
    with pytest.raises(WrongKindOfData, match="this data is conversations"):
        train_with(method="dpo")
    with pytest.raises(WrongKindOfData, match="this data is preference pairs"):
        train_with(samples=preferences())

    strict = tmp_path / "strict"
    shutil.copytree(base, strict)
    guard = "{{ raise_exception('no system role') if messages[0].role == 'system' }}"
    template = strict / "chat_template.jinja"
    template.write_text(guard + template.read_text())
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "?"}]
    messages.append({"role": "assistant", "content": "!"})
    with pytest.raises(UnusableTokenizer, match="refuses sample 25: no system role"):
        train_with(str(strict), [*chats(), Sample.model_validate({"messages": messages})])


@pytest.mark.parametrize(
    ("spec", "values", "reason"),
    [
        (FineTuneSpec, {"pissa": True, "method": "dpo"}, "which dpo compares with"),
        (ForgeSpec, {"adapter": True, "tuning": "full"}, "makes no adapter"),
        (ForgeSpec, {"eval_split": 0}, "set eval_split above 0"),
    ],
)
def test_an_inconsistent_spec_is_refused_at_once(spec: type[FineTuneSpec], values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        spec.model_validate({"data": {"dataset": "any"}, **values})


def test_early_stopping_counts_evaluations_that_are_nan(tmp_path: Path) -> None:
    from transformers.trainer_callback import TrainerControl, TrainerState

    from pipelines.training.fine_tune.callbacks import ProgressCallback

    callback = ProgressCallback(spec_of(early_stopping=2), RecordingObserver(tmp_path), {})
    control = TrainerControl()
    stops: list[bool] = []
    for _ in range(2):
        callback.on_evaluate(None, TrainerState(), control, metrics={"eval_loss": math.nan})
        stops.append(control.should_training_stop)
    assert stops == [False, True]


@pytest.mark.deep
def test_a_loss_that_is_nan_fails_the_training(base: str, tmp_path: Path) -> None:
    from pipelines.training.fine_tune.callbacks import TrainingDiverged

    with pytest.raises(TrainingDiverged, match=r"choose a lower learning_rate than 1e\+30"):
        train(
            spec_of(tuning="full", learning_rate=1e30, epochs=50), base, tmp_path / "work", RecordingObserver(tmp_path)
        )


@pytest.mark.deep
def test_an_automatic_batch_size_is_found(base: str, tmp_path: Path) -> None:
    observer = RecordingObserver(tmp_path / "kept")
    outcome = train(spec_of(batch_size="auto", epochs=1), base, tmp_path / "work", observer)
    assert "finding the batch size" in observer.phases
    assert 1 <= outcome.batch_size <= 22 // 8
    assert outcome.steps == math.ceil(22 / outcome.batch_size)


@pytest.mark.deep
def test_processes_that_train_together_agree_on_the_batch_size(base: str, tmp_path: Path) -> None:
    """The second process has memory for batches of two, and after the training has begun only of one."""
    command = [sys.executable, "-m", "tests.pipelines.training.fine_tune.two_processes", base, str(tmp_path)]
    # The processes find each other through a file, but accelerate requires an address.
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **environment, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    outputs = [process.communicate(timeout=TIMEOUT) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
    assert first == {"batch_size": 2, "refused": None}
    assert second == {"batch_size": 2, "refused": {"batch_size": 1, "gradient_accumulation": 2}}


def test_every_process_finds_the_checkpoints(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.training.fine_tune import job as fine_tune_job
    from tests.support.job_harness import JobHarness
    from tests.support.recording_link import RecordingLink

    link = RecordingLink()
    observers: list[Any] = []
    for rank in (0, 1):
        (tmp_path / f"{rank}").mkdir()
        monkeypatch.setattr("ray.train.get_context", lambda rank=rank: TrainContext(rank))
        context = JobHarness(tmp_path).context("job_x", link)
        observers.append(fine_tune_job.JobObserver(context, {}, tmp_path))
    monkeypatch.setattr("torch.distributed.barrier", Barrier(2, timeout=TIMEOUT).wait)

    def save(rank: int, step: int) -> None:
        name = "weights" if rank == 0 else f"rng_state_{rank}.pth"
        (tmp_path / f"{rank}" / name).write_text(f"{step}")
        observers[rank].save_checkpoint(tmp_path / f"{rank}", {"step": step, "best_step": 2})

    with ThreadPoolExecutor(2) as threads:
        for step in (2, 4, 6, 8):
            list(threads.map(save, (0, 1), (step, step)))
    manifest = link.checkpoints[-1]["manifests"]["8"]
    assert set(manifest["files"]) == {"weights", "rng_state_1.pth"}
    for observer in observers:
        assert {path.name for path in observer.load_checkpoint(2).iterdir()} == {"weights", "rng_state_1.pth"}
        assert (observer.latest_checkpoint() / "weights").read_text() == "8"
        with pytest.raises(KeyError):
            observer.load_checkpoint(4)


def test_all_processes_restart_when_one_needs_smaller_batches(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs import outputs
    from pipelines.training.data import datasets
    from pipelines.training.fine_tune import batch_size, recipe
    from pipelines.training.fine_tune import job as fine_tune_job
    from tests.support.job_harness import JobHarness
    from tests.support.recording_link import RecordingLink

    smaller = {"batch_size": 4, "gradient_accumulation": 2}
    resume_states: list[Any] = []

    def train_without_memory(*_: Any, resume_state: Any, **__: Any) -> None:
        resume_states.append(resume_state)
        if len(resume_states) > 1:
            raise TrainingInterrupted
        raise batch_size.RestartWithSmallerBatch("Out of memory", details=smaller)

    def run_here(context: Any, spec: Any, work: Any) -> Any:
        return work()

    dataset = datasets.Dataset(id="ds_1", name="any", digest="", address="", samples=24)
    link = RecordingLink()
    link.checkpoints.append({"dataset": "ds_1", "base_model": "forgearr/tiny"})
    monkeypatch.setattr("ray.train.get_context", lambda: TrainContext(1))
    monkeypatch.setattr(datasets, "get", always(dataset))
    monkeypatch.setattr(datasets, "load", always(chats()))
    monkeypatch.setattr(recipe, "train", train_without_memory)
    monkeypatch.setattr(fine_tune_job, "_run_on_ray_train", run_here)
    monkeypatch.setattr(outputs, "own_job", always(JobRow(link.checkpoints)))
    with pytest.raises(TrainingInterrupted):
        fine_tune_job.fine_tune(JobHarness(tmp_path).context("job_x", link), spec_of())
    assert resume_states == [None, smaller]
    assert link.checkpoints[-1] == {**link.checkpoints[0], "place": smaller}


def test_a_stored_result_is_returned_without_training(home: Path, tmp_path: Path) -> None:
    from pipelines.training.fine_tune.job import fine_tune
    from tests.support.job_harness import JobHarness
    from tests.support.recording_link import RecordingLink

    link = RecordingLink()
    (tmp_path / "weights").write_text("some")
    checkpoint = storage.save(tmp_path / "weights", "jobs/job_x/checkpoints/1-2/weights").rpartition("/")[0]
    state = {"dataset": "gone", "base_model": "gone", "checkpoints": {"2": checkpoint}}
    link.checkpoints.append({**state, "result": {"name": "house"}})
    assert fine_tune(JobHarness(tmp_path).context("job_x", link), spec_of()) == {"name": "house"}
    assert not storage.exists(checkpoint)


def train_with_memory_limit(megabytes: int, base: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Train in a process that may use this much more memory than it has when the training begins."""
    # Freed memory would otherwise stay in the heap, in fragments too small for the next try.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "tests.pipelines.training.fine_tune.low_memory", base, str(folder), str(megabytes)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)


@pytest.mark.deep
def test_out_of_memory_halves_the_batch_size(base: str, tmp_path: Path) -> None:
    process = train_with_memory_limit(300, base, tmp_path)
    assert process.returncode == 0, process.stderr[-2000:]
    outcome = json.loads(process.stdout.splitlines()[-1])
    assert outcome["batch_size"] < 16
    assert "Out of memory at step 0. Continuing with batches of" in outcome["warnings"][0]
    assert outcome["steps"] == 3


@pytest.mark.deep
def test_too_little_memory_for_one_sample_fails_the_training(base: str, tmp_path: Path) -> None:
    process = train_with_memory_limit(45, base, tmp_path)
    assert process.returncode == 1
    assert "OutOfMemory: There is not enough memory to train" in process.stderr


def long_chats(count: int) -> list[Sample]:
    text = "a word and another word and " * 100
    return [
        Sample.model_validate(
            {
                "messages": [
                    {"role": "user", "content": "Tell me."},
                    {"role": "assistant", "content": f"{number} {text}"},
                ]
            }
        )
        for number in range(count)
    ]


def preferences() -> list[PreferencePair]:
    return [
        PreferencePair.model_validate(
            {
                "messages": [{"role": "user", "content": f"Shall I delete disk {number}?"}],
                "chosen": [{"role": "assistant", "content": "No, ask first."}],
                "rejected": [{"role": "assistant", "content": "Yes, at once!"}],
            }
        )
        for number in range(12)
    ]


class TrainContext:
    """Ray Train's context in one of two processes that train together."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def get_world_rank(self) -> int:
        return self._rank

    def get_world_size(self) -> int:
        return 2


class JobRow:
    """The job's row, with the latest checkpoint."""

    def __init__(self, checkpoints: list[Any]) -> None:
        self._checkpoints = checkpoints

    @property
    def checkpoint(self) -> Any:
        return self._checkpoints[-1]


def always(value: Any) -> Callable[..., Any]:
    def return_value(*_: Any) -> Any:
        return value

    return return_value


def test_each_epoch_reports_its_validation_metrics(base: str, tmp_path: Path) -> None:
    observer = RecordingObserver(tmp_path / "kept")
    spec = spec_of(epochs=2, batch_size=4, keep_epochs=2)
    outcome = train(spec, base, tmp_path / "work", observer, chats(8), validation=chats(5))
    assert (outcome.train, outcome.held_out) == (8, 5)
    assert [(epoch["step"], epoch["epoch"]) for epoch in observer.epochs] == [(2, 1.0), (4, 2.0)]
    evaluated = [entry["eval_loss"] for entry in outcome.history if "eval_loss" in entry]
    assert [epoch["eval_loss"] for epoch in observer.epochs] == evaluated
    losses = {entry["step"]: entry["loss"] for entry in outcome.history if "loss" in entry}
    assert [epoch["loss"] for epoch in observer.epochs] == [losses[2], losses[4]]
    assert all(0 <= epoch["token_accuracy"] <= 1 for epoch in observer.epochs)
