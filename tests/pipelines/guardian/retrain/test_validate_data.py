"""The checks of datasets before a training: what is counted, and what fails the job."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from cluster import storage
from cluster.db import run_with_database
from cluster.ownership import LOCAL
from pipelines.guardian.retrain import validate_data
from pipelines.guardian.retrain.validate_data import HeldOutLeaked, TooLittleData
from pipelines.training.data import content as data_content
from pipelines.training.data import datasets
from pipelines.training.data.samples import Sample
from pipelines.training.fine_tune.tokenize import render
from pipelines.training.models import tiny
from tests.support.job_harness import JobHarness


@pytest.fixture
def harness(migrated: Path) -> JobHarness:
    return JobHarness(migrated)


def test_samples_characters_tokens_and_duplicates_are_counted(harness: JobHarness) -> None:
    samples = [chat(f"What is {number}?", f"It is {number}.") for number in range(30)]
    train = [*samples[:25], samples[0], chat("WHAT  is 1?", "It is 1.")]  # two duplicates
    spec = {"train": store_dataset("train", train), "held_out": store_dataset("held", samples[25:]), "min_samples": 25}
    result, link = run(harness, spec)
    assert (result["enough"], result["reasons"], result["leaked"]) == (True, [], 0)
    trained, held_out = result["train"], result["held_out"]
    assert (trained["samples"], trained["duplicates"]) == (27, 2)
    assert (held_out["samples"], held_out["duplicates"]) == (5, 0)
    assert held_out["characters"] == {"min": 20, "median": 20, "mean": 20, "max": 20, "total": 100}
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny.model_folder())
    tokens = [len(tokenizer(render(tokenizer, messages_of(sample), None))["input_ids"]) for sample in samples[25:]]
    assert held_out["tokens"]["total"] == sum(tokens)
    assert held_out["tokens"]["counted_in"] == 5
    assert trained["kinds"] == {"other": 1}
    assert result["shared"] == {"questions": 0, "answers": 0, "files": 0}

    card = storage.read(result["card"]).decode()
    assert "| Samples | 27 | 5 |" in card
    assert "| Duplicates | 2 | 0 |" in card
    document = json.loads(storage.read(result["card"].replace("data_card.md", "data_card.json")))
    assert document["datasets"] == {"train": "repo/train:v1", "held_out": "repo/held:v1"}
    inputs = [data["name"] for kind, data in link.events if kind == "input"]
    assert inputs == ["repo/train (train)", "repo/held (held_out)"]


def test_too_few_samples_fail_the_job_and_the_message_has_the_numbers(harness: JobHarness) -> None:
    samples = [chat(str(number), "Yes.") for number in range(4)]
    spec = {"train": store_dataset("train", [*samples[:3], samples[0]]), "held_out": store_dataset("held", samples[3:])}
    job_id, link = harness.start("validate_data", spec, tracked=False)
    with pytest.raises(TooLittleData, match="there are 3 different samples to train on, and at least 20 are required"):
        harness.resume("validate_data", spec, job_id, link)
    assert not TooLittleData.retryable
    card = storage.read(address_of(job_id, "data_card.md")).decode()
    assert "- There are 3 different samples" in card
    result, _ = run(harness, {**spec, "min_samples": 3})
    assert result["enough"]


def test_data_without_held_out_samples_is_refused(harness: JobHarness) -> None:
    """A repository with one file is such a case."""
    spec = {"train": store_dataset("train", [chat(str(number), "Yes.") for number in range(20)]), "held_out": None}
    job_id, link = harness.start("validate_data", spec, tracked=False)
    with pytest.raises(TooLittleData, match="there are no held-out samples"):
        harness.resume("validate_data", spec, job_id, link)
    card = storage.read(address_of(job_id, "data_card.md")).decode()
    assert "measured on nothing" in card
    assert "| Samples | 20 | 0 |" in card


def test_held_out_samples_in_the_training_data_are_refused(harness: JobHarness) -> None:
    samples = [chat(str(number), "Yes.") for number in range(4)]
    spec = {"train": store_dataset("train", samples), "held_out": store_dataset("held", [samples[2]]), "min_samples": 1}
    with pytest.raises(HeldOutLeaked, match="1 of 1 held-out samples"):
        run(harness, spec)
    # The same answer to another question is no leak; it is only reported.
    result, _ = run(harness, {**spec, "held_out": store_dataset("other", [chat("nine", "Yes.")])})
    assert (result["leaked"], result["shared"]["answers"]) == (0, 1)


def test_only_some_of_many_samples_are_tokenized(harness: JobHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate_data, "MAX_TOKENIZED_SAMPLES", 10)
    long = chat("Tell me all.", "word " * 3000)
    train = [*(chat(str(number), "Yes.") for number in range(30)), long]
    spec = {
        "train": store_dataset("train", train),
        "held_out": store_dataset("held", [long, chat("x", "y")]),
        "min_samples": 1,
    }
    with pytest.raises(HeldOutLeaked):
        run(harness, spec)
    result, _ = run(harness, {**spec, "held_out": store_dataset("other", [chat("x", "long " * 3000)])})
    assert result["train"]["tokens"]["counted_in"] == 8  # every fourth of 31
    assert (result["held_out"]["too_long"], result["held_out"]["tokens"]["counted_in"]) == (1, 1)


def run(harness: JobHarness, spec: dict[str, Any]) -> tuple[Any, Any]:
    job_id, link = harness.start("validate_data", spec, tracked=False)
    return harness.resume("validate_data", spec, job_id, link), link


def chat(question: str, answer: str) -> Sample:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Sample.model_validate({"messages": messages})


def messages_of(sample: Sample) -> list[dict[str, Any]]:
    return sample.model_dump(exclude_none=True)["messages"]


def store_dataset(name: str, samples: Sequence[Sample]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        content = data_content.write_samples(samples, Path(folder) / "samples.jsonl", name)
        return run_with_database(
            lambda database: datasets.store_dataset(database, f"repo/{name}", content, {}, LOCAL)
        ).id


def address_of(job_id: str, name: str) -> str:
    (address,) = [address for address in storage.find(f"jobs/{job_id}") if address.endswith(f"/{name}")]
    return address
