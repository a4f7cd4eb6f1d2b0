"""The kind `validate`: what a fine-tune has made beside its base, and its GGUF beside both, on unseen samples."""

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
from jobs.outputs import Made
from jobs.registry import Resources, job
from pipelines.training.data import parsing
from pipelines.training.data.samples import Sample
from pipelines.training.export.convert import load_merged, load_whole
from pipelines.training.fine_tune.preprocess import HELD_OUT, context_of
from pipelines.training.models import base_models, registry
from pipelines.training.spec import Gate, ValidateSpec
from pipelines.training.validate import metrics as eval_metrics
from pipelines.training.validate import progress as eval_progress
from pipelines.training.validate import report
from pipelines.training.validate.gguf_model import GgufModel
from pipelines.training.validate.metrics import Measured, Prepared
from pipelines.training.validate.progress import Measurements

TOGETHER = 4
"""How many samples are measured before the next look at what the job is asked."""

GATES: dict[Gate, tuple[str, bool]] = {
    "max_perplexity": ("perplexity", False),
    "max_perplexity_ratio": ("perplexity_ratio", False),
    "min_rouge_l": ("rouge_l", True),
    "min_exact_match": ("exact_match", True),
    "min_top1_agreement": ("gguf_top1_agreement", True),
    "max_kl": ("gguf_kl", False),
}
"""Which metric each gate looks at, and whether more of it is better."""
GGUF_GATES = {"min_top1_agreement", "max_kl"}
TITLES = {"base": "base", "tuned": "model", "gguf": "GGUF"}

Results = dict[str, list[Measured]]
"""By model (base, tuned, gguf), what each sample has given so far."""


class NothingHeldOut(UnprocessableRequest):
    """The training has held no samples out, so there is nothing to validate on: train with eval_split above 0."""

    code = "NOTHING_HELD_OUT"


class NotItsExport(Conflict):
    """The export was made from another fine-tune."""

    code = "EXPORT_OF_ANOTHER_JOB"


@job("validate", spec=ValidateSpec, resources=Resources(cpus=1), tracked=True)
def validate(context: Context, spec: ValidateSpec) -> dict[str, Any]:
    """Measures a fine-tuned model beside its base, and its GGUF beside both."""
    state: dict[str, Any] = context.checkpoint_state or {}
    result = state.get("result") or _validate(context, spec)
    eval_progress.settle(context, result)
    context.report(progress=100, phase="passed" if result["passed"] else "did not pass", **_numbers(result["metrics"]))
    return result


def summarize(measured: Results, prepared: Sequence[Prepared]) -> dict[str, float | None]:
    """The metrics; null is what was not measured."""
    metrics: dict[str, float | None] = {"samples": len(prepared)}
    for which, prefix in (("base", "base_"), ("tuned", ""), ("gguf", "gguf_")):
        rows = measured.get(which)
        scores = [
            eval_metrics.score(answer, question.expected)
            for sample, row in zip(prepared, rows or (), strict=False)
            for question, answer in zip(sample.questions, row["answers"], strict=True)
        ]
        tokens = eval_metrics.total(rows or (), "tokens")
        loss = eval_metrics.total(rows or (), "loss") / tokens if rows and tokens else None
        metrics["final_loss" if which == "tuned" else f"{prefix}loss"] = loss
        metrics[f"{prefix}perplexity"] = None if loss is None else eval_metrics.perplexity(loss)
        for name, field in (("exact_match", "exact"), ("rouge_l", "rouge_l"), ("rouge_1", "rouge_1")):
            values = [float(cast(Mapping[str, Any], score)[field]) for score in scores]
            metrics[prefix + name] = sum(values) / len(values) if values else None
        if which == "tuned":
            metrics["tokens"], metrics["answers"] = tokens, len(scores)
    tuned, base = metrics["final_loss"], metrics["base_loss"]
    metrics["perplexity_ratio"] = None if tuned is None or base is None else eval_metrics.perplexity(tuned - base)
    rows = measured.get("gguf") or []
    tokens, questions = eval_metrics.total(rows, "tokens"), sum(len(row["answers"]) for row in rows)
    metrics["gguf_top1_agreement"] = eval_metrics.total(rows, "agreed") / tokens if tokens else None
    metrics["gguf_kl"] = eval_metrics.total(rows, "kl") / tokens if tokens else None
    metrics["gguf_same_tokens"] = eval_metrics.total(rows, "same") / questions if questions else None
    return metrics


def judge(metrics: Mapping[str, float | None], gates: Mapping[str, float | None], *, with_gguf: bool) -> list[str]:
    """Why it does not pass; empty when it does."""
    reasons: list[str] = []
    for gate, (metric, more_is_better) in GATES.items():
        limit = gates[gate]
        if limit is None or (gate in GGUF_GATES and not with_gguf):
            continue
        value = metrics[metric]
        if value is None:
            reasons.append(f"{metric} was not measured, and {gate} wants it to be {limit:g}")
        elif not (value >= limit if more_is_better else value <= limit):
            reasons.append(f"{metric} is {value:.4g}, and {gate} is {limit:g}")
    return reasons


def _validate(context: Context, spec: ValidateSpec) -> dict[str, Any]:
    made = outputs.of(spec.job_id, "fine_tune", context.owner_id)
    exported = _export(spec, made, context) if spec.export_job_id else None
    threads = max(1, int(outputs.own_row(context.job_id).resources["cpus"]))
    with workspace.folder(context.job_id) as place:
        context.report(progress=0, phase="fetching the models")
        model = base_models.fetch(made.result["model"], place, made.job_id)
        conversations = _held_out(model, made.job_id)[: spec.max_samples]
        gguf = asyncio.run(_fetch(exported)) if exported else None
        measured, prepared = _measure(context, spec, made, model, conversations, gguf, threads, place)
        metrics = summarize(measured, prepared)
        gates = {**get_settings().gates.model_dump(), **spec.gates}
        reasons = judge(metrics, gates, with_gguf=exported is not None)
        facts = {
            "name": made.result["name"],
            "base_model": made.result["base_model"],
            "job_id": made.job_id,
            "export": exported.result if exported else None,
            "passed": not reasons,
            "reasons": reasons,
            "gates": gates,
            "metrics": metrics,
            "samples": report.by_sample(conversations, prepared, measured),
        }
        context.report(progress=97, phase="writing the report")
        files = report.write(facts, place)
        addresses = {path.name: context.artifact(path) for path in files}
    if exported:
        asyncio.run(_judge(exported, reasons))
    return {
        "passed": not reasons,
        "reasons": reasons,
        "metrics": metrics,
        "report_path": addresses[report.MARKDOWN],
        "report_json": addresses[report.JSON],
    }


def _numbers(metrics: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if value is not None and math.isfinite(value)}


def _export(spec: ValidateSpec, made: Made, context: Context) -> Made:
    exported = outputs.of(spec.export_job_id or "", "export", context.owner_id)
    source = outputs.of(exported.spec["job_id"], "fine_tune", context.owner_id)
    if source.job_id != made.job_id:
        raise NotItsExport(f"{exported.job_id} has exported {source.job_id}, not {made.job_id}.")
    return exported


def _held_out(model: Path, job_id: str) -> list[Sample]:
    file = model / HELD_OUT
    text = file.read_text() if file.exists() else ""
    if not text.strip():
        raise NothingHeldOut(
            f"{job_id} has held no samples out, so there is nothing to validate on: train with eval_split above 0."
        )
    return [sample for sample in parsing.parse(text, HELD_OUT) if isinstance(sample, Sample)]


async def _fetch(exported: Made) -> Path:
    async with registry.connect() as models:
        version = await models.find(f"{exported.result['name']}:v{exported.result['version']}")
        return await models.fetch(version)


async def _judge(exported: Made, reasons: Sequence[str]) -> None:
    async with registry.connect() as models:
        await models.judge(exported.result["name"], exported.result["version"], not reasons, reasons)


def _measure(
    context: Context,
    spec: ValidateSpec,
    made: Made,
    model: Path,
    conversations: Sequence[Sample],
    gguf: Path | None,
    threads: int,
    place: Path,
) -> tuple[Results, list[Prepared]]:
    """Everything, one model after the other, from where an earlier attempt got to."""
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(threads)
    base = base_models.folder(made.result["base_model"])
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    limit = context_of(base, tokenizer)
    prepared = [eval_metrics.prepare(tokenizer, sample, limit) for sample in conversations]
    progress = Measurements(context, place, len(prepared) * (3 if gguf else 2), TITLES)
    options: Any = {"max_new_tokens": spec.max_new_tokens, "should_stop": context.should_stop}

    def one_by_one(which: str, model: Any) -> None:
        def measure_some(start: int) -> list[Measured]:
            some = prepared[start : start + TOGETHER]
            return eval_metrics.measure(model, tokenizer, some, context=limit, **options)

        progress.follow(which, len(prepared), measure_some)

    if progress.lacks("base", len(prepared)):
        one_by_one("base", _load(base))
    if progress.lacks("tuned", len(prepared)) or (gguf and progress.lacks("gguf", len(prepared))):
        tuned = _load(load_merged(base, model) if base_models.is_adapter(model) else model)
        one_by_one("tuned", tuned)
        if gguf:
            longest = max(len(one.input_ids) for sample in prepared for one in sample.encodings)
            room = min(limit, longest + spec.max_new_tokens)
            with GgufModel(str(gguf), room, threads) as exported:

                def compare_one(start: int) -> list[Measured]:
                    return [eval_metrics.compare(tuned, exported, tokenizer, prepared[start], **options)]

                progress.follow("gguf", len(prepared), compare_one)
    return progress.rows, prepared


def _load(source: Any) -> Any:
    import torch

    model: Any = load_whole(source) if isinstance(source, str | Path) else source
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
