"""The promotion gate, with trained models, as GGUF files in a real registry."""

import asyncio
import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster import storage
from jobs.context import StopJob
from pipelines.guardian.retrain import compare
from pipelines.guardian.retrain.compare import NothingComparable, evaluate_gate, sample_evenly
from pipelines.training.data.parsing import parse_samples
from pipelines.training.data.samples import Sample
from pipelines.training.fine_tune.tokenize import encode, turns
from pipelines.training.models import registry
from pipelines.training.models.versions import ModelFile, Version
from pipelines.training.validate.gguf_tokenizer import GgufTokenizer
from pipelines.training.validate.job import NothingHeldOut
from tests.support.job_harness import JobHarness
from tests.support.registry_model import register_model
from tests.support.small_models import write_constant_model, write_model

SHORT = {"max_new_tokens": 16}


@pytest.fixture
def subject(harness: JobHarness, mlflow_server: str, tmp_path: Path) -> tuple[str, str]:
    """A model with two random versions, of which the first is served, and a training with a held-out split."""
    files = [write_model(tmp_path / f"{seed}.gguf", seed=seed) for seed in (1, 2)]
    name = register_model(mlflow_server, tmp_path, *files)
    set_validation(name, 2, True)
    return name, harness.fine_tuned("full")


@pytest.mark.deep
def test_a_better_version_is_promoted_and_a_worse_one_is_not(harness: JobHarness, trained: Path) -> None:
    weak, strong = harness.fine_tuned("lora"), harness.fine_tuned("full")
    name = f"subject-{strong[-4:]}"
    for job_id in (weak, strong):
        harness.run("export", {"job_id": job_id, "name": name, "quantizations": ["q8_0"]})
    serve(name, 1)
    set_validation(name, 1, True)
    set_validation(name, 2, True)
    _, result, link = harness.run("compare", {"name": name, "version": 2, "job_id": strong, **SHORT})
    assert result["promoted"]
    assert (result["served"], result["questions"], result["left_out"]) == (1, 6, 0)
    candidate, served = result["metrics"]["candidate"], result["metrics"]["served"]
    assert result["improvement"] == pytest.approx(1 - candidate["bits_per_character"] / served["bits_per_character"])
    assert result["improvement"] > 0.2
    assert candidate["rouge_l"] > served["rouge_l"]
    # Transformers computes the same value from the model before its conversion.
    assert candidate["bits_per_character"] == pytest.approx(bits_of(trained / "full"), rel=0.02)
    assert link.progress == sorted(link.progress)

    comparison = asyncio.run(find(f"{name}:v2")).comparison
    assert comparison == {key: value for key, value in result.items() if key != "report"}
    report = json.loads(storage.read(result["report"]))
    assert len(report["answers"]) == 5
    assert report["answers"][0]["expected"] == ["Sonarr tracks series."]
    assert set(report["answers"][0]["answers"]) == {"candidate", "served"}

    serve(name, 2)
    _, result, _ = harness.run("compare", {"name": name, "version": 1, "job_id": weak, **SHORT})
    assert not result["promoted"]
    assert result["improvement"] < 0
    assert "more, and at least 2.0% fewer are required" in result["reason"]
    assert asyncio.run(find(f"{name}:latest")).number == 2


@pytest.mark.deep
def test_the_spec_sets_the_margin_and_the_number_of_samples(harness: JobHarness, subject: tuple[str, str]) -> None:
    name, training = subject
    spec = {"name": name, "version": 2, "job_id": training, "max_samples": 2, **SHORT}
    _, result, _ = harness.run("compare", {**spec, "min_improvement": 0.99})
    assert not result["promoted"]
    assert (result["questions"], result["min_improvement"]) == (2, 0.99)


@pytest.mark.deep
def test_a_first_version_is_promoted_if_it_passed_its_validation(harness: JobHarness) -> None:
    training = harness.fine_tuned("lora")
    _, exported, _ = harness.run("export", {"job_id": training, "quantizations": ["q8_0"]})
    name = exported["name"]
    spec = {"name": name, "version": 1, "job_id": training, "max_samples": 1, **SHORT}
    _, result, _ = harness.run("compare", spec)
    assert not result["promoted"]
    assert "it was never validated" in result["reason"]
    set_validation(name, 1, True)
    _, result, _ = harness.run("compare", spec)
    assert (result["promoted"], result["served"], result["improvement"]) == (True, None, None)
    assert result["metrics"]["served"] is None
    assert result["metrics"]["candidate"]["bits_per_character"] > 0


@pytest.mark.deep
def test_a_paused_comparison_resumes_where_it_stopped(harness: JobHarness, subject: tuple[str, str]) -> None:
    name, training = subject
    spec = {"name": name, "version": 2, "job_id": training, **SHORT}
    _, expected, _ = harness.run("compare", spec)

    job_id, link = harness.start("compare", spec)
    context = harness.context(job_id, link)
    pause_phase = "measuring the version that is served: 2"
    link.on_report = lambda phase: context.stop("pause") if phase.startswith(pause_phase) else None
    with pytest.raises(StopJob, match="pause"):
        harness.call("compare", spec, context)
    link.on_report = lambda phase: None
    seen_events = len(link.events)
    result = harness.resume("compare", spec, job_id, link)
    assert result["metrics"] == expected["metrics"]
    phases = [data["phase"] for _, data in link.events[seen_events:] if "measuring" in data.get("phase", "")]
    measured = [phase.partition(" of ")[0].rpartition(" ")[2] for phase in phases]
    # The candidate comes first. Before the pause it was measured, and so were two samples of the served version.
    assert measured == ["2", "3", "4"]
    assert not [address for address in storage.find(f"jobs/{job_id}") if address.endswith("measured.json")]
    # If a worker dies before it stores the result, the next one finds it in the job's folder.
    seen_events = len(link.events)
    assert harness.resume("compare", spec, job_id, link) == result
    assert not [1 for _, data in link.events[seen_events:] if "measuring" in data.get("phase", "")]


@pytest.mark.deep
def test_a_training_without_held_out_samples_is_refused(harness: JobHarness, subject: tuple[str, str]) -> None:
    name, training = subject
    (Path(storage.address(f"jobs/{training}/model")) / "held_out.jsonl").unlink()
    with pytest.raises(NothingHeldOut, match=training):
        harness.run("compare", {"name": name, "version": 2, "job_id": training})


def test_models_with_different_tokenizers_get_the_same_samples(tmp_path: Path) -> None:
    """They differ in vocabulary, template and context. A sample that fits only one of them is skipped for both."""
    small = write_model(tmp_path / "small.gguf", context=64)
    other = write_constant_model(tmp_path / "other.gguf", "The quick brown fox jumps over the lazy dog.")
    short, tools = chat("Hé?", "The quick brown fox."), tool_call_sample()
    long = chat("What is it?", "The quick brown fox jumps. " * 20)
    plain = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
    with GgufTokenizer(str(small)) as first, GgufTokenizer(str(other), plain) as second:
        prepared = compare.prepare([short, long], {"candidate": first, "served": second})
        assert (prepared.skipped, prepared.characters) == (1, [20])
        ((candidate,),), ((served,),) = prepared.by_model["candidate"], prepared.by_model["served"]
        assert (candidate.expected, served.expected) == ("The quick brown fox.", "The quick brown fox.")
        assert candidate.answer[-1] != served.answer[-1]  # the end token differs
        assert second.decode(served.prompt) == "Hé?"
        prompts = [turns(tokenizer, short.model_dump()["messages"])[0][0] for tokenizer in (first, second)]
        assert prompts[0].endswith("<|im_start|>assistant\n")
        assert prompts[1] == "Hé?<|im_end|>"
        with pytest.raises(NothingComparable, match="None of the 1 held-out samples"):
            compare.prepare([long], {"candidate": first})
        # A template without tools cannot express a call, so such a sample is skipped too.
        with pytest.raises(NothingComparable):
            compare.prepare([tools], {"served": second})


@pytest.mark.parametrize(("number", "max_samples", "chosen"), [(3, 5, [0, 1, 2]), (10, 4, [0, 2, 5, 7]), (4, 1, [0])])
def test_samples_are_spread_evenly(number: int, max_samples: int, chosen: list[int]) -> None:
    conversations = [chat(str(each), "Yes.") for each in range(number)]
    assert [sample.messages[0].content for sample in sample_evenly(conversations, max_samples)] == [
        str(each) for each in chosen
    ]


@pytest.mark.parametrize(
    ("bits", "served_bits", "min_improvement", "promoted"),
    [(0.98, 1, 0.02, True), (0.981, 1, 0.02, False), (1, 1, 0, False), (2, 1, 0, False), (0.5, 0, 0, False)],
)
def test_the_gate_requires_the_minimum_improvement(
    bits: float, served_bits: float, min_improvement: float, promoted: bool
) -> None:
    metrics = {"candidate": {"bits_per_character": bits}, "served": {"bits_per_character": served_bits}}
    passed, improvement, reason = evaluate_gate(version(2), version(1), metrics, min_improvement)
    assert passed is promoted
    assert improvement == pytest.approx(1 - bits / served_bits if served_bits else 0)
    assert reason.startswith("m:v2 needs ")


@pytest.mark.deep
def test_a_served_or_invalid_version_is_not_promoted(harness: JobHarness, subject: tuple[str, str]) -> None:
    name, training = subject
    serve(name, 2)
    spec = {"name": name, "version": 2, "job_id": training, "max_samples": 1, **SHORT}
    _, result, _ = harness.run("compare", spec)
    assert (result["promoted"], result["reason"]) == (False, f"{name}:v2 is already served.")
    serve(name, 1)
    set_validation(name, 2, False, ["its perplexity is 900"])
    _, result, _ = harness.run("compare", spec)
    assert result["reason"] == f"{name}:v2 did not pass its validation: its perplexity is 900."
    assert (result["promoted"], result["improvement"]) == (False, None)
    assert result["metrics"]["served"] is not None


def bits_of(model: Path) -> float:
    """Compute the bits per character of the held-out answers with transformers."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    network: Any = AutoModelForCausalLM.from_pretrained(model)
    samples = [
        sample
        for sample in parse_samples((model / "held_out.jsonl").read_bytes(), "test")
        if isinstance(sample, Sample)
    ]
    nats = characters = 0.0
    for sample in samples:
        document = sample.model_dump(exclude_none=True)
        for encoding in encode(tokenizer, document["messages"], document.get("tools")):
            labels = torch.tensor([encoding.labels])
            with torch.inference_mode():
                loss = network(input_ids=torch.tensor([encoding.input_ids]), labels=labels).loss
            nats += loss.item() * encoding.learned_tokens
        for message in sample.messages:
            if message.role == "assistant":
                characters += len(message.content or "")
                characters += sum(len(c.function.name) + len(c.function.arguments) for c in message.tool_calls or ())
    return nats / math.log(2) / characters


def version(number: int) -> Version:
    file = ModelFile("m.gguf", "q8_0", "0" * 64, 1)
    return Version("m", number, "", [file], None, "forgearr/tiny", "", "", True, datetime.now(UTC))


def chat(question: str, answer: str) -> Sample:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Sample.model_validate({"messages": messages})


def tool_call_sample() -> Sample:
    """Make a sample whose answer is a tool call. A template without tools renders nothing for it."""
    function = {"name": "look", "parameters": {"type": "object", "properties": {}}}
    call = {"id": "call_1", "function": {"name": "look", "arguments": "{}"}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}]
    return Sample.model_validate({"messages": messages, "tools": [{"type": "function", "function": function}]})


def serve(name: str, number: int) -> None:
    async def write() -> None:
        async with registry.connect() as models:
            await models.set_served(name, number)

    asyncio.run(write())


def set_validation(name: str, number: int, passed: bool, reasons: Sequence[str] = ()) -> None:
    async def write() -> None:
        async with registry.connect() as models:
            await models.set_validation(name, number, passed, reasons)

    asyncio.run(write())


async def find(reference: str) -> Version:
    async with registry.connect() as models:
        return await models.find(reference)
