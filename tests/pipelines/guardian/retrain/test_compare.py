"""The promotion gate, with models that were really trained, as real GGUF files in a real registry."""

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
    """A model of two versions that know nothing, the first of which is served; and a training that held samples out."""
    files = [write_model(tmp_path / f"{seed}.gguf", seed=seed) for seed in (1, 2)]
    name = register_model(mlflow_server, tmp_path, *files)
    judged(name, 2, True)
    return name, harness.fine_tuned("full")


def test_the_better_one_is_promoted_and_the_worse_one_is_not(harness: JobHarness, trained: Path) -> None:
    weak, strong = harness.fine_tuned("lora"), harness.fine_tuned("full")
    name = f"subject-{strong[-4:]}"
    for job_id in (weak, strong):
        harness.run("export", {"job_id": job_id, "name": name, "quantizations": ["q8_0"]})
    serve(name, 1)
    judged(name, 1, True)
    judged(name, 2, True)
    _, result, link = harness.run("compare", {"name": name, "version": 2, "job_id": strong, **SHORT})
    assert result["promoted"]
    assert (result["served"], result["questions"], result["left_out"]) == (1, 6, 0)
    candidate, served = result["metrics"]["candidate"], result["metrics"]["served"]
    assert result["improvement"] == pytest.approx(1 - candidate["bits_per_character"] / served["bits_per_character"])
    assert result["improvement"] > 0.2
    assert candidate["rouge_l"] > served["rouge_l"]
    # The same, from the model itself before it became a GGUF.
    assert candidate["bits_per_character"] == pytest.approx(bits_of(trained / "full"), rel=0.02)
    assert link.progress == sorted(link.progress)

    kept = asyncio.run(find(f"{name}:v2")).comparison
    assert kept == {key: value for key, value in result.items() if key != "report"}
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
def test_the_margin_and_the_number_of_samples_are_what_is_asked_for(
    harness: JobHarness, subject: tuple[str, str]
) -> None:
    name, training = subject
    spec = {"name": name, "version": 2, "job_id": training, "max_samples": 2, **SHORT}
    _, result, _ = harness.run("compare", {**spec, "min_improvement": 0.99})
    assert not result["promoted"]
    assert (result["questions"], result["min_improvement"]) == (2, 0.99)


@pytest.mark.deep
def test_the_first_one_is_promoted_if_it_passed_its_validation(harness: JobHarness) -> None:
    training = harness.fine_tuned("lora")
    _, exported, _ = harness.run("export", {"job_id": training, "quantizations": ["q8_0"]})
    name = exported["name"]
    spec = {"name": name, "version": 1, "job_id": training, "max_samples": 1, **SHORT}
    _, result, _ = harness.run("compare", spec)
    assert not result["promoted"]
    assert "it was never validated" in result["reason"]
    judged(name, 1, True)
    _, result, _ = harness.run("compare", spec)
    assert (result["promoted"], result["served"], result["improvement"]) == (True, None, None)
    assert result["metrics"]["served"] is None
    assert result["metrics"]["candidate"]["bits_per_character"] > 0


@pytest.mark.deep
def test_it_goes_on_from_where_it_was_paused(harness: JobHarness, subject: tuple[str, str]) -> None:
    name, training = subject
    spec = {"name": name, "version": 2, "job_id": training, **SHORT}
    _, expected, _ = harness.run("compare", spec)

    job_id, link = harness.start("compare", spec)
    context = harness.context(job_id, link)
    pausing = "measuring the version that is served: 2"
    link.on_report = lambda phase: context.stop("pause") if phase.startswith(pausing) else None
    with pytest.raises(StopJob, match="pause"):
        harness.call("compare", spec, context)
    link.on_report = lambda phase: None
    before = len(link.events)
    result = harness.resume("compare", spec, job_id, link)
    assert result["metrics"] == expected["metrics"]
    phases = [data["phase"] for _, data in link.events[before:] if "measuring" in data.get("phase", "")]
    measured = [phase.partition(" of ")[0].rpartition(" ")[2] for phase in phases]
    # The candidate, which comes first, was measured before the pause; and so were two samples of the other.
    assert measured == ["2", "3", "4"]
    assert not storage.exists(storage.address(f"jobs/{job_id}/measured.json"))
    # A worker that dies before it could tell the result leaves it to the next.
    before = len(link.events)
    assert harness.resume("compare", spec, job_id, link) == result
    assert not [1 for _, data in link.events[before:] if "measuring" in data.get("phase", "")]


def test_what_nobody_held_out_cannot_be_asked(harness: JobHarness, subject: tuple[str, str]) -> None:
    name, training = subject
    (Path(storage.address(f"jobs/{training}/model")) / "held_out.jsonl").unlink()
    with pytest.raises(NothingHeldOut, match=training):
        harness.run("compare", {"name": name, "version": 2, "job_id": training})


def test_models_of_other_words_are_asked_the_same(tmp_path: Path) -> None:
    """Two vocabularies, two templates, two contexts: what only one of them can read, neither is asked."""
    small = write_model(tmp_path / "small.gguf", context=64)
    other = write_constant_model(tmp_path / "other.gguf", "The quick brown fox jumps over the lazy dog.")
    short, tools = chat("Hé?", "The quick brown fox."), calling()
    long = chat("What is it?", "The quick brown fox jumps. " * 20)
    plain = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
    with GgufTokenizer(str(small)) as first, GgufTokenizer(str(other), plain) as second:
        asked = compare.prepare([short, long], {"candidate": first, "served": second})
        assert (asked.skipped, asked.characters) == (1, [20])
        ((one,),), ((two,),) = asked.by_model["candidate"], asked.by_model["served"]
        assert (one.expected, two.expected) == ("The quick brown fox.", "The quick brown fox.")
        assert one.answer[-1] != two.answer[-1]  # the token that ends it is another one
        assert second.decode(two.prompt) == "Hé?"
        told = [turns(words, short.model_dump()["messages"])[0][0] for words in (first, second)]
        assert told[0].endswith("<|im_start|>assistant\n")
        assert told[1] == "Hé?<|im_end|>"
        with pytest.raises(NothingComparable, match="None of the 1 held-out samples"):
            compare.prepare([long], {"candidate": first})
        # Nor is a call asked of a model whose template has no words for it.
        with pytest.raises(NothingComparable):
            compare.prepare([tools], {"served": second})


@pytest.mark.parametrize(("number", "most", "chosen"), [(3, 5, [0, 1, 2]), (10, 4, [0, 2, 5, 7]), (4, 1, [0])])
def test_samples_are_taken_from_everywhere(number: int, most: int, chosen: list[int]) -> None:
    conversations = [chat(str(each), "Yes.") for each in range(number)]
    assert [one.messages[0].content for one in sample_evenly(conversations, most)] == [str(each) for each in chosen]


@pytest.mark.parametrize(
    ("bits", "before", "least", "promoted"),
    [(0.98, 1, 0.02, True), (0.981, 1, 0.02, False), (1, 1, 0, False), (2, 1, 0, False), (0.5, 0, 0, False)],
)
def test_the_verdict(bits: float, before: float, least: float, promoted: bool) -> None:
    metrics = {"candidate": {"bits_per_character": bits}, "served": {"bits_per_character": before}}
    told, improvement, reason = evaluate_gate(version(2), version(1), metrics, least)
    assert told is promoted
    assert improvement == pytest.approx(1 - bits / before if before else 0)
    assert reason.startswith("m:v2 needs ")


@pytest.mark.deep
def test_some_are_never_promoted(harness: JobHarness, subject: tuple[str, str]) -> None:
    name, training = subject
    serve(name, 2)
    spec = {"name": name, "version": 2, "job_id": training, "max_samples": 1, **SHORT}
    _, result, _ = harness.run("compare", spec)
    assert (result["promoted"], result["reason"]) == (False, f"{name}:v2 is already served.")
    serve(name, 1)
    judged(name, 2, False, ["its perplexity is 900"])
    _, result, _ = harness.run("compare", spec)
    assert result["reason"] == f"{name}:v2 did not pass its validation: its perplexity is 900."
    assert (result["promoted"], result["improvement"]) == (False, None)
    assert result["metrics"]["served"] is not None


def bits_of(model: Path) -> float:
    """Bits per character of the held-out answers, by transformers."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    network: Any = AutoModelForCausalLM.from_pretrained(model)
    samples = [one for one in parse_samples((model / "held_out.jsonl").read_bytes(), "test") if isinstance(one, Sample)]
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


def calling() -> Sample:
    """An answer that is a call, of which a template without tools says nothing."""
    function = {"name": "look", "parameters": {"type": "object", "properties": {}}}
    call = {"id": "call_1", "function": {"name": "look", "arguments": "{}"}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}]
    return Sample.model_validate({"messages": messages, "tools": [{"type": "function", "function": function}]})


def serve(name: str, number: int) -> None:
    async def point() -> None:
        async with registry.connect() as models:
            await models.set_served(name, number)

    asyncio.run(point())


def judged(name: str, number: int, passed: bool, reasons: Sequence[str] = ()) -> None:
    async def judge() -> None:
        async with registry.connect() as models:
            await models.set_validation(name, number, passed, reasons)

    asyncio.run(judge())


async def find(reference: str) -> Version:
    async with registry.connect() as models:
        return await models.find(reference)
