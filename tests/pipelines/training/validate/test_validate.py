"""Validation of trained models: its metrics, compared with the same metrics computed in another way."""

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster import storage
from cluster.settings import get_settings
from jobs.context import StopJob
from pipelines.training.data.parsing import parse_samples
from pipelines.training.data.samples import Sample
from pipelines.training.fine_tune.tokenize import encode
from pipelines.training.models import base_models, registry
from pipelines.training.models import versions as models_versions
from pipelines.training.models.merge import load_merged
from pipelines.training.validate import job as validate_job
from pipelines.training.validate import metrics as eval_metrics
from pipelines.training.validate.job import ExportMismatch, NothingHeldOut
from pipelines.training.validate.metrics import score
from tests.support.job_harness import JobHarness

MEASURED = {"final_loss", "perplexity", "base_loss", "base_perplexity", "exact_match", "rouge_l", "base_rouge_l"}


@pytest.mark.deep
def test_a_model_is_compared_with_its_base_and_its_gguf(harness: JobHarness, trained: Path) -> None:
    fine_tune = harness.fine_tuned("full")
    export, exported, _ = harness.run("export", {"job_id": fine_tune, "quantizations": ["q8_0"]})
    spec = {"job_id": fine_tune, "export_job_id": export, "max_new_tokens": 24}
    _, result, link = harness.run("validate", spec)
    metrics = result["metrics"]

    tokenizer = AutoTokenizer.from_pretrained(trained / "full")
    samples = held_out(trained / "full")
    tuned = AutoModelForCausalLM.from_pretrained(trained / "full")
    base = AutoModelForCausalLM.from_pretrained(base_models.resolve("forgearr/tiny"))
    assert metrics["final_loss"] == pytest.approx(mean_loss(tuned, tokenizer, samples), rel=1e-4)
    assert metrics["base_loss"] == pytest.approx(mean_loss(base, tokenizer, samples), rel=1e-4)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["final_loss"]))
    assert metrics["perplexity_ratio"] == pytest.approx(metrics["perplexity"] / metrics["base_perplexity"])
    assert metrics["final_loss"] < 0.7 * metrics["base_loss"], "nothing was learned"
    assert (metrics["samples"], metrics["answers"]) == (5, 6)

    # The GGUF is the same model with rounded weights.
    assert metrics["gguf_loss"] == pytest.approx(metrics["final_loss"], rel=0.02)
    assert 0.9 <= metrics["gguf_top1_agreement"] <= 1
    assert 0 < metrics["gguf_kl"] < 0.05
    assert metrics["gguf_same_tokens"] == 1

    report = json.loads(storage.read(result["report_json"]))
    for sample, entry in zip(samples, report["samples"], strict=True):
        expected = answers(tuned, tokenizer, sample, 24)
        assert entry["models"]["tuned"]["answers"] == expected
    assert report["samples"][-1]["expected"][0].startswith('<tool_call>\n{"name": "search_series"')
    assert report["samples"][-1]["expected"][1] == "Yes, Dark is there."

    assert result["passed"]
    assert result["reasons"] == []
    version = asyncio.run(find(f"{exported['name']}:v{exported['version']}"))
    assert version.passed is True
    assert version.validation is not None
    assert version.validation["gates"] == get_settings().gates.model_dump()
    assert version.validation["metrics"] == {metric: metrics[metric] for metric, _ in validate_job.GATES.values()}
    markdown = storage.read(result["report_path"]).decode()
    assert "| Perplexity |" in markdown
    assert "**Passed.**" in markdown
    plot = Path(result["report_path"]).with_name("validation.png").read_bytes()
    assert plot.startswith(b"\x89PNG")
    assert link.progress == sorted(link.progress)


@pytest.mark.deep
def test_a_validation_without_an_export_has_no_gguf_metrics(harness: JobHarness) -> None:
    spec = {"job_id": harness.fine_tuned("lora"), "max_samples": 2, "max_new_tokens": 4}
    _, result, _ = harness.run("validate", {**spec, "gates": {"min_rouge_l": 0.9, "max_perplexity_ratio": None}})
    metrics = result["metrics"]
    assert {name for name, value in metrics.items() if value is None} == {
        name for name in metrics if name.startswith("gguf_")
    }
    assert metrics.keys() >= MEASURED
    assert metrics["samples"] == 2
    assert result["reasons"] == ["rouge_l is 0, and min_rouge_l is 0.9"]
    assert not result["passed"]
    assert "GGUF" not in storage.read(result["report_path"]).decode()


@pytest.mark.deep
def test_a_paused_validation_resumes_where_it_stopped(harness: JobHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate_job, "SAMPLES_PER_ROUND", 2)
    spec = {"job_id": harness.fine_tuned("lora"), "max_new_tokens": 4}
    _, expected, uninterrupted = harness.run("validate", spec)

    job_id, link = harness.start("validate", spec)
    context = harness.context(job_id, link)
    link.on_report = lambda phase: context.stop("pause") if phase.startswith("measuring the model: 2") else None
    with pytest.raises(StopJob, match="pause"):
        harness.call("validate", spec, context)
    link.on_report = lambda phase: None
    seen_events = len(link.events)
    result = harness.resume("validate", spec, job_id, link)
    assert result["metrics"] == expected["metrics"]
    phases = [data["phase"] for _, data in link.events[seen_events:] if data.get("phase", "").startswith("measuring")]
    assert phases[0].startswith("measuring the model: ")
    assert not [address for address in storage.find(f"jobs/{job_id}") if address.endswith("measured.json")]
    assert len([1 for _, data in uninterrupted.events if data.get("phase", "").startswith("measuring")]) == 6


@pytest.mark.deep
def test_a_job_that_cannot_be_validated_is_refused(harness: JobHarness, trained: Path) -> None:
    fine_tune = harness.fine_tuned("full")
    (Path(storage.address(f"jobs/{fine_tune}/model")) / "held_out.jsonl").unlink()
    with pytest.raises(NothingHeldOut, match="eval_split above 0"):
        harness.run("validate", {"job_id": fine_tune})
    export, _ = harness.start("export", {"job_id": harness.fine_tuned("full")})
    harness.finish(export, {"name": "other", "version": 1})
    with pytest.raises(ExportMismatch):
        harness.run("validate", {"job_id": fine_tune, "export_job_id": export})


@pytest.mark.deep
def test_an_adapter_is_validated_merged_into_its_base(trained: Path, harness: JobHarness) -> None:
    base = base_models.resolve("forgearr/tiny")
    tokenizer: Any = AutoTokenizer.from_pretrained(trained / "lora")
    prepared = [eval_metrics.prepare(tokenizer, sample, 2048) for sample in held_out(trained / "lora")]
    merged = load_merged(base, trained / "lora").eval()
    measurements = eval_metrics.measure(
        merged, tokenizer, prepared, context=2048, max_new_tokens=2, should_stop=lambda: False
    )
    loss = eval_metrics.sum_of(measurements, "loss") / eval_metrics.sum_of(measurements, "tokens")
    assert loss == pytest.approx(mean_loss(merged, tokenizer, held_out(trained / "lora")), rel=1e-4)
    base_model = AutoModelForCausalLM.from_pretrained(base)
    assert loss < mean_loss(base_model, tokenizer, held_out(trained / "lora"))
    # A sample longer than the model's context is truncated.
    truncated = eval_metrics.prepare(tokenizer, held_out(trained / "lora")[-1], 60)
    assert all(len(encoding.input_ids) <= 60 for encoding in truncated.encodings)
    assert len(truncated.questions) < len(prepared[-1].questions)
    with pytest.raises(eval_metrics.MeasurementInterrupted):
        eval_metrics.measure(merged, tokenizer, prepared, context=2048, max_new_tokens=2, should_stop=lambda: True)


@pytest.mark.parametrize(
    ("answer", "expected", "rouge_l", "rouge_1", "exact"),
    [
        ("the cat sat", "the cat sat", 1, 1, True),
        ("  The CAT sat\n", "the cat sat", 1, 1, False),
        ("the cat sat", "sat the cat", 2 / 3, 1, False),
        ("a b c d", "a x c", 4 / 7, 4 / 7, False),
        ("a a a", "a", 0.5, 0.5, False),
        ("something", "else", 0, 0, False),
        ("", "else", 0, 0, False),
        ("", "", 1, 1, True),
    ],
)
def test_rouge_is_the_f_measure_of_words(
    answer: str, expected: str, rouge_l: float, rouge_1: float, exact: bool
) -> None:
    scores = score(answer, expected)
    assert scores["rouge_l"] == pytest.approx(rouge_l)
    assert scores["rouge_1"] == pytest.approx(rouge_1)
    assert scores["exact"] is exact


@pytest.mark.parametrize(
    ("gates", "with_gguf", "reasons"),
    [
        ({}, False, []),
        ({"max_perplexity": 9.0}, False, ["perplexity is 10, and max_perplexity is 9"]),
        ({"max_perplexity": 10.0, "min_exact_match": 0.5}, False, []),
        ({"min_exact_match": 0.6}, False, ["exact_match is 0.5, and min_exact_match is 0.6"]),
        ({"min_rouge_l": 0.1}, False, ["rouge_l was not measured, and min_rouge_l is 0.1"]),
        ({"max_kl": 0.1, "min_top1_agreement": 1.0}, False, []),
        ({"max_kl": 0.1}, True, ["gguf_kl was not measured, and max_kl is 0.1"]),
        ({"min_top1_agreement": 0.95}, True, ["gguf_top1_agreement is 0.9, and min_top1_agreement is 0.95"]),
        ({"max_perplexity_ratio": 1.0}, False, ["perplexity_ratio is inf, and max_perplexity_ratio is 1"]),
    ],
)
def test_each_failed_gate_has_a_reason(gates: dict[str, float], with_gguf: bool, reasons: list[str]) -> None:
    metrics = {
        "perplexity": 10.0,
        "perplexity_ratio": math.inf,
        "exact_match": 0.5,
        "rouge_l": None,
        "gguf_kl": None,
        "gguf_top1_agreement": 0.9,
    }
    all_gates = {gate: gates.get(gate) for gate in validate_job.GATES}
    assert validate_job.check_gates(metrics, all_gates, with_gguf=with_gguf) == reasons


async def find(reference: str) -> models_versions.Version:
    async with registry.connect() as models:
        return await models.find(reference)


def held_out(model: Path) -> list[Sample]:
    samples = parse_samples((model / "held_out.jsonl").read_text(), "held_out.jsonl")
    return [sample for sample in samples if isinstance(sample, Sample)]


def mean_loss(model: Any, tokenizer: Any, samples: list[Sample]) -> float:
    """Compute the mean loss over all tokens with transformers."""
    losses: list[tuple[float, int]] = []
    for sample in samples:
        document = sample.model_dump(exclude_none=True)
        for encoding in encode(tokenizer, document["messages"], document.get("tools")):
            with torch.inference_mode():
                output = model(input_ids=torch.tensor([encoding.input_ids]), labels=torch.tensor([encoding.labels]))
            losses.append((output.loss.item(), encoding.learned_tokens))
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


def answers(model: Any, tokenizer: Any, sample: Sample, max_tokens: int) -> list[str]:
    """Generate the answers greedily, one token at a time, without batches or cache."""
    texts: list[str] = []
    for question in eval_metrics.prepare(tokenizer, sample, 2048).questions:
        ids = list(question.prompt_ids)
        while len(ids) - len(question.prompt_ids) < max_tokens:
            with torch.inference_mode():
                token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
        texts.append(tokenizer.decode(ids[len(question.prompt_ids) :]))
    return texts
