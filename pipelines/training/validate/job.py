"""The kind `validate`: measure a trained model, its base and its GGUF on held-out samples, and check the gates."""

import asyncio
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from cluster.errors import Conflict, UnprocessableRequest
from cluster.settings import get_settings
from jobs import outputs
from jobs.context import Context
from jobs.execution import workspace
from jobs.outputs import JobOutput
from jobs.registry import Resources, job
from pipelines.training.data import parsing
from pipelines.training.data.samples import Sample
from pipelines.training.fine_tune.preprocess import HELD_OUT_FILE, context_length
from pipelines.training.models import base_models, registry
from pipelines.training.models.merge import load_dequantized, load_merged
from pipelines.training.spec import Gate, ValidateSpec, gates_choice
from pipelines.training.validate import metrics as eval_metrics
from pipelines.training.validate import progress as eval_progress
from pipelines.training.validate import report
from pipelines.training.validate.gguf_model import GgufModel
from pipelines.training.validate.metrics import PreparedSample, SampleMetrics
from pipelines.training.validate.progress import Measurements

SAMPLES_PER_ROUND = 4
"""The number of samples that are measured between two checks whether the job should stop."""

GATES: dict[Gate, tuple[str, bool]] = {
    "min_samples": ("samples", True),
    "max_perplexity": ("perplexity", False),
    "max_perplexity_ratio": ("perplexity_ratio", False),
    "min_rouge_l": ("rouge_l", True),
    "min_exact_match": ("exact_match", True),
    "min_top1_agreement": ("gguf_top1_agreement", True),
    "max_kl": ("gguf_kl", False),
}
"""The metric of each gate, and whether more of it is better."""
GGUF_GATES = {"min_top1_agreement", "max_kl"}
MODEL_TITLES = {"base": "base", "tuned": "model", "gguf": "GGUF"}

ModelMetrics = dict[str, list[SampleMetrics]]
"""By model (base, tuned, gguf): the metrics of each sample that was measured so far."""


class NothingHeldOut(UnprocessableRequest):
    """The training held out no samples, so there is nothing to validate on: train with eval_split above 0."""

    code = "NOTHING_HELD_OUT"


class ExportMismatch(Conflict):
    """The export was made from another fine-tune."""

    code = "EXPORT_OF_ANOTHER_JOB"


@job("validate", spec=ValidateSpec, resources=Resources(cpus=1), admin_only=gates_choice, tracked=True)
def validate(context: Context, spec: ValidateSpec) -> dict[str, Any]:
    """Measures a fine-tuned model, its base and its GGUF, and checks the gates."""
    state: dict[str, Any] = context.checkpoint_state or {}
    result = state.get("result") or _validate(context, spec)
    eval_progress.save_result(context, result)
    context.report(
        progress=100, phase="passed" if result["passed"] else "did not pass", **_finite_metrics(result["metrics"])
    )
    return result


def summarize(measured: ModelMetrics, prepared: Sequence[PreparedSample]) -> dict[str, float | None]:
    """The metrics over all samples. What was not measured is None."""
    metrics: dict[str, float | None] = {"samples": len(prepared)}
    for model_key, prefix in (("base", "base_"), ("tuned", ""), ("gguf", "gguf_")):
        rows = measured.get(model_key)
        scores = [
            eval_metrics.score(answer, question.expected)
            for sample, row in zip(prepared, rows or (), strict=False)
            for question, answer in zip(sample.questions, row["answers"], strict=True)
        ]
        tokens = eval_metrics.sum_of(rows or (), "tokens")
        loss = eval_metrics.sum_of(rows or (), "loss") / tokens if rows and tokens else None
        metrics["final_loss" if model_key == "tuned" else f"{prefix}loss"] = loss
        metrics[f"{prefix}perplexity"] = None if loss is None else eval_metrics.perplexity(loss)
        for name, field in (("exact_match", "exact"), ("rouge_l", "rouge_l"), ("rouge_1", "rouge_1")):
            values = [float(cast(Mapping[str, Any], score)[field]) for score in scores]
            metrics[prefix + name] = sum(values) / len(values) if values else None
        if model_key == "tuned":
            metrics["tokens"], metrics["answers"] = tokens, len(scores)
    tuned, base = metrics["final_loss"], metrics["base_loss"]
    metrics["perplexity_ratio"] = None if tuned is None or base is None else eval_metrics.perplexity(tuned - base)
    rows = measured.get("gguf") or []
    tokens, questions = eval_metrics.sum_of(rows, "tokens"), sum(len(row["answers"]) for row in rows)
    metrics["gguf_top1_agreement"] = eval_metrics.sum_of(rows, "agreed") / tokens if tokens else None
    metrics["gguf_kl"] = eval_metrics.sum_of(rows, "kl") / tokens if tokens else None
    metrics["gguf_same_tokens"] = eval_metrics.sum_of(rows, "same") / questions if questions else None
    return metrics


def check_gates(
    metrics: Mapping[str, float | None], gates: Mapping[str, float | None], *, with_gguf: bool
) -> list[str]:
    """The reasons why the metrics do not pass the gates; empty if they pass."""
    reasons: list[str] = []
    for gate, (metric, more_is_better) in GATES.items():
        limit = gates[gate]
        if limit is None or (gate in GGUF_GATES and not with_gguf):
            continue
        value = metrics.get(metric)
        if value is None:
            reasons.append(f"{metric} was not measured, and {gate} is {limit:g}")
        elif not (value >= limit if more_is_better else value <= limit):
            reasons.append(f"{metric} is {value:.4g}, and {gate} is {limit:g}")
    return reasons


def _validate(context: Context, spec: ValidateSpec) -> dict[str, Any]:
    training = outputs.get_output(spec.job_id, "fine_tune", context.owner_id)
    export_output = _find_export(spec, training, context) if spec.export_job_id else None
    threads = max(1, int(outputs.own_job(context.job_id).resources["cpus"]))
    with workspace.temporary_folder(context.job_id) as folder:
        context.report(progress=0, phase="fetching the models")
        model = base_models.fetch(training.result["model"], folder, training.job_id)
        conversations = _load_held_out(model, training.job_id)[: spec.max_samples]
        gguf = asyncio.run(_fetch_gguf(export_output)) if export_output else None
        measured, prepared = _measure_models(context, spec, training, model, conversations, gguf, threads, folder)
        metrics = summarize(measured, prepared)
        gates = {**get_settings().gates.model_dump(), **spec.gates}
        reasons = check_gates(metrics, gates, with_gguf=export_output is not None)
        report_data = {
            "name": training.result["name"],
            "base_model": training.result["base_model"],
            "job_id": training.job_id,
            "export": export_output.result if export_output else None,
            "passed": not reasons,
            "reasons": reasons,
            "gates": gates,
            "metrics": metrics,
            "samples": report.by_sample(conversations, prepared, measured),
        }
        context.report(progress=97, phase="writing the report")
        files = report.write(report_data, folder)
        addresses = {path.name: context.artifact(path) for path in files}
    if export_output:
        asyncio.run(_record_validation(export_output, reasons, gates, metrics))
    return {
        "passed": not reasons,
        "reasons": reasons,
        "metrics": metrics,
        "report_path": addresses[report.MARKDOWN_NAME],
        "report_json": addresses[report.JSON_NAME],
    }


def _finite_metrics(metrics: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if value is not None and math.isfinite(value)}


def _find_export(spec: ValidateSpec, training: JobOutput, context: Context) -> JobOutput:
    export_output = outputs.get_output(spec.export_job_id or "", "export", context.owner_id)
    export_training = outputs.get_output(export_output.spec["job_id"], "fine_tune", context.owner_id)
    if export_training.job_id != training.job_id:
        raise ExportMismatch(f"{export_output.job_id} has exported {export_training.job_id}, not {training.job_id}.")
    return export_output


def _load_held_out(model: Path, job_id: str) -> list[Sample]:
    file = model / HELD_OUT_FILE
    text = file.read_text() if file.exists() else ""
    if not text.strip():
        raise NothingHeldOut(
            f"{job_id} held out no samples, so there is nothing to validate on: train with eval_split above 0."
        )
    return [sample for sample in parsing.parse_samples(text, HELD_OUT_FILE) if isinstance(sample, Sample)]


async def _fetch_gguf(export_output: JobOutput) -> Path:
    async with registry.connect() as models:
        version = await models.find(f"{export_output.result['name']}:v{export_output.result['version']}")
        return await models.fetch(version)


async def _record_validation(
    export_output: JobOutput,
    reasons: Sequence[str],
    gates: Mapping[str, float | None],
    metrics: Mapping[str, float | None],
) -> None:
    """Record the verdict with what it depends on, so that a deployment can judge by other gates."""
    name, number = export_output.result["name"], export_output.result["version"]
    measured = {metric: metrics[metric] for metric, _ in GATES.values()}
    async with registry.connect() as models:
        await models.set_validation(name, number, not reasons, reasons, {"gates": gates, "metrics": measured})


def _measure_models(
    context: Context,
    spec: ValidateSpec,
    training: JobOutput,
    model: Path,
    conversations: Sequence[Sample],
    gguf: Path | None,
    threads: int,
    folder: Path,
) -> tuple[ModelMetrics, list[PreparedSample]]:
    """Measure one model after the other. What an earlier attempt has measured is not measured again."""
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(threads)
    base = base_models.resolve(training.result["base_model"], context.owner_id)
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    limit = context_length(base, tokenizer)
    prepared = [eval_metrics.prepare(tokenizer, sample, limit) for sample in conversations]
    progress = Measurements(context, folder, len(prepared) * (3 if gguf else 2), MODEL_TITLES)
    options: Any = {"max_new_tokens": spec.max_new_tokens, "should_stop": context.should_stop}

    def measure_model(model_key: str, model: Any) -> None:
        def measure_batch(start: int) -> list[SampleMetrics]:
            batch = prepared[start : start + SAMPLES_PER_ROUND]
            return eval_metrics.measure(model, tokenizer, batch, context=limit, **options)

        progress.measure_missing(model_key, len(prepared), measure_batch)

    if progress.needs_more("base", len(prepared)):
        measure_model("base", _load(base))
    if progress.needs_more("tuned", len(prepared)) or (gguf and progress.needs_more("gguf", len(prepared))):
        tuned = _load(load_merged(base, model) if base_models.is_adapter(model) else model)
        measure_model("tuned", tuned)
        if gguf:
            max_tokens = max(len(one.input_ids) for sample in prepared for one in sample.encodings)
            context_size = min(limit, max_tokens + spec.max_new_tokens)
            with GgufModel(str(gguf), context_size, threads) as gguf_model:

                def compare_one(start: int) -> list[SampleMetrics]:
                    return [eval_metrics.compare(tuned, gguf_model, tokenizer, prepared[start], **options)]

                progress.measure_missing("gguf", len(prepared), compare_one)
    return progress.rows, prepared


def _load(source: Any) -> Any:
    import torch

    model: Any = load_dequantized(source) if isinstance(source, str | Path) else source
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
