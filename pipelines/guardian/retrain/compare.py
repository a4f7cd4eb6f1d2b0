"""The kind `compare`: the promotion gate. It measures a new version and the served one on the same held-out samples.

Both are measured as they are served: GGUF files with their own tokenizers and chat templates. Because two tokenizers
split a text into different tokens, the measure is the loss per character of the expected answers, in bits.
"""

import asyncio
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from pydantic import Field

from cluster import storage
from cluster.errors import UnprocessableRequest
from cluster.settings import get_settings
from jobs import outputs
from jobs.context import Context
from jobs.execution import workspace
from jobs.registry import Resources, job
from pipelines.training.data import parsing
from pipelines.training.data.messages import Message
from pipelines.training.data.samples import Sample
from pipelines.training.fine_tune.preprocess import HELD_OUT_FILE
from pipelines.training.fine_tune.tokenize import UnusableTokenizer, turns
from pipelines.training.models import registry
from pipelines.training.models.versions import ModelNotFound, Version
from pipelines.training.spec import JobId, ModelName, Spec
from pipelines.training.validate import metrics as eval_metrics
from pipelines.training.validate import progress as eval_progress
from pipelines.training.validate.gguf_model import GgufModel
from pipelines.training.validate.gguf_tokenizer import GgufTokenizer
from pipelines.training.validate.job import NothingHeldOut
from pipelines.training.validate.metrics import MeasurementInterrupted
from pipelines.training.validate.progress import Measurements, Row

REPORT = "comparison.json"
TITLES = {"served": "version that is served", "candidate": "candidate"}


class CompareSpec(Spec):
    """The version to compare with the one that is served."""

    name: ModelName
    version: int = Field(ge=1)
    job_id: JobId = Field(description="The fine_tune job whose held-out samples are the questions.")
    max_samples: int = Field(default=100, ge=1, le=100_000)
    max_new_tokens: int = Field(default=128, ge=1, le=4096, description="The maximum length of generated answers.")
    min_improvement: float | None = Field(
        default=None, ge=0, lt=1, description="Null: guardian.min_improvement of the settings."
    )


class NothingComparable(UnprocessableRequest):
    """No held-out sample fits into both models."""

    code = "NOTHING_COMPARABLE"


@dataclass(frozen=True)
class Question:
    """One of the assistant's answers and its prompt, in the tokens of one of the models."""

    prompt: list[int]
    answer: list[int]
    expected: str


@dataclass(frozen=True)
class EvalSet:
    """The same samples, tokenized for each model."""

    by_model: dict[str, list[list[Question]]]
    characters: list[int]  # of the expected answers of each sample
    skipped: int  # samples that do not fit into one of the models


@job("compare", spec=CompareSpec, resources=Resources(cpus=1), admin_only=True, tracked=True)
def compare(context: Context, spec: CompareSpec) -> dict[str, Any]:
    """Compares a new version of a model with the served one, and decides whether it should replace it."""
    state: dict[str, Any] = context.checkpoint_state or {}
    result = state.get("result") or _compare(context, spec)
    eval_progress.save_result(context, result)
    numbers = {
        f"{role}_{name}": value
        for role, metrics in result["metrics"].items()
        for name, value in (metrics or {}).items()
    }
    context.report(progress=100, phase="promoted" if result["promoted"] else "a candidate", **numbers)
    return result


def sample_evenly(conversations: Sequence[Sample], max_samples: int) -> list[Sample]:
    """Select samples evenly from beginning to end, because neighbours are often from the same file."""
    if len(conversations) <= max_samples:
        return list(conversations)
    return [conversations[number * len(conversations) // max_samples] for number in range(max_samples)]


def prepare(conversations: Sequence[Sample], tokenizers: Mapping[str, GgufTokenizer]) -> EvalSet:
    """Tokenize for each model the samples that fit whole into all of them."""
    by_model: dict[str, list[list[Question]]] = {role: [] for role in tokenizers}
    characters: list[int] = []
    for sample in conversations:
        tokenized = {role: _questions(sample, tokenizer) for role, tokenizer in tokenizers.items()}
        length = sum(_length(message) for message in sample.messages if message.role == "assistant")
        if length and all(tokenized.values()):
            characters.append(length)
            for role, questions in tokenized.items():
                by_model[role].append(questions)
    if not characters:
        raise NothingComparable(
            f"None of the {len(conversations)} held-out samples fit whole into {' and '.join(tokenizers)}: they are "
            "longer than the models' contexts, or the chat templates cannot render them."
        )
    return EvalSet(by_model, characters, len(conversations) - len(characters))


def summarize(eval_set: EvalSet, rows: Sequence[Row], role: str) -> dict[str, float]:
    nats = sum(row["nats"] for row in rows)
    scores = [
        eval_metrics.score(answer, question.expected)
        for questions, row in zip(eval_set.by_model[role], rows, strict=True)
        for question, answer in zip(questions, row["answers"], strict=True)
    ]
    return {
        "bits_per_character": nats / math.log(2) / sum(eval_set.characters),
        "rouge_l": sum(score["rouge_l"] for score in scores) / len(scores),
        "exact_match": sum(score["exact"] for score in scores) / len(scores),
    }


def evaluate_gate(
    new: Version,
    served: Version | None,
    metrics: Mapping[str, Mapping[str, float]],
    min_improvement: float,
    veto_reason: str | None = None,
) -> tuple[bool, float | None, str]:
    """Whether the new version replaces the served one, its improvement, and the reason."""
    if veto_reason is not None:
        return False, None, veto_reason
    if served is None:
        return True, None, f"No version of {new.name} is served, and {new.reference} passed its validation."
    bits, before = (metrics[role]["bits_per_character"] for role in ("candidate", "served"))
    improvement = 1 - bits / before if before else 0.0
    summary = (
        f"{new.reference} needs {bits:.4g} bits per character of the held-out answers, and {served.reference}, which "
        f"is served, {before:.4g}: {abs(improvement):.1%} {'fewer' if improvement >= 0 else 'more'}"
    )
    is_better = improvement >= min_improvement and improvement > 0
    return (
        is_better,
        improvement,
        f"{summary}{'.' if is_better else f', and at least {min_improvement:.1%} fewer are required.'}",
    )


def _compare(context: Context, spec: CompareSpec) -> dict[str, Any]:
    new, served = asyncio.run(_versions(spec))
    min_improvement = get_settings().guardian.min_improvement if spec.min_improvement is None else spec.min_improvement
    veto_reason = _veto_reason(new, served)
    baseline = served if served and served.number != new.number and not served.is_adapter else None
    conversations = sample_evenly(_held_out(spec.job_id, context.owner_id), spec.max_samples)
    with workspace.temporary_folder(context.job_id) as folder, ExitStack() as stack:
        context.report(progress=0, phase="fetching the models")
        files = asyncio.run(_fetch([version for version in (baseline, new) if version is not None]))
        versions = {"candidate": new, **({"served": baseline} if baseline else {})}
        tokenizers = {
            role: stack.enter_context(GgufTokenizer(str(files[version.reference]), version.defaults.template))
            for role, version in versions.items()
        }
        eval_set = prepare(conversations, tokenizers)
        total = len(eval_set.characters) * len(versions)
        measured = Measurements(context, folder, total, TITLES, {"served": baseline.reference if baseline else None})
        for role, version in versions.items():
            _measure_all(context, spec, measured, eval_set, role, str(files[version.reference]), tokenizers[role])
        metrics = {role: summarize(eval_set, measured.rows[role], role) for role in versions}
        promoted, improvement, reason = evaluate_gate(new, served, metrics, min_improvement, veto_reason)
        verdict = {
            "name": new.name,
            "version": new.number,
            "served": served.number if served else None,
            "promoted": promoted,
            "reason": reason,
            "improvement": improvement,
            "min_improvement": min_improvement,
            "questions": sum(len(questions) for questions in eval_set.by_model["candidate"]),
            "left_out": eval_set.skipped,
            "metrics": {role: metrics.get(role) for role in ("candidate", "served")},
        }
        report = folder / REPORT
        report.write_text(json.dumps({**verdict, "answers": _answers(eval_set, measured.rows)}, indent=2))
        address = context.artifact(report)
    asyncio.run(_save_comparison(new, verdict))
    return {**verdict, "report": address}


def _veto_reason(new: Version, served: Version | None) -> str | None:
    """The reason not to promote the new version, whatever the measurement, if there is one."""
    if new.passed is not True:
        why = "; ".join(new.reasons) if new.passed is False else "it was never validated"
        return f"{new.reference} did not pass its validation: {why}."
    if served is None:
        return None
    if served.number == new.number:
        return f"{new.reference} is already served."
    if served.is_adapter:
        return f"{served.reference}, which is served, is an adapter, which cannot be measured alone."
    return None


async def _versions(spec: CompareSpec) -> tuple[Version, Version | None]:
    async with registry.connect() as models:
        new = await models.find(f"{spec.name}:v{spec.version}")
        try:
            return new, await models.find(spec.name)
        except ModelNotFound:
            return new, None


async def _fetch(versions: Sequence[Version]) -> dict[str, Path]:
    async with registry.connect() as models:
        return {version.reference: await models.fetch(version) for version in versions}


async def _save_comparison(new: Version, verdict: Mapping[str, Any]) -> None:
    async with registry.connect() as models:
        await models.save_comparison(new.name, new.number, verdict)


def _held_out(job_id: str, owner_id: str | None) -> list[Sample]:
    output = outputs.get_output(job_id, "fine_tune", owner_id)
    address = f"{output.result['model']}/{HELD_OUT_FILE}"
    text = storage.read(address) if storage.exists(address) else b""
    if not text.strip():
        raise NothingHeldOut(f"{output.job_id} held out no samples, so there is nothing to compare on.")
    return [sample for sample in parsing.parse_samples(text, HELD_OUT_FILE) if isinstance(sample, Sample)]


def _questions(sample: Sample, tokenizer: GgufTokenizer) -> list[Question]:
    """The questions of a sample; empty if the sample does not fit whole into the model."""
    document = sample.model_dump(exclude_none=True)
    try:
        pairs = turns(tokenizer, document["messages"], document.get("tools"))
    except (TemplateError, UnusableTokenizer):
        return []
    questions = [_question(tokenizer, before, answer) for before, answer in pairs]
    fits = all(
        question.prompt
        and question.expected.strip()
        and len(question.prompt) + len(question.answer) <= tokenizer.context_length
        for question in questions
    )
    return questions if fits else []


def _question(tokenizer: GgufTokenizer, before: str, answer: str) -> Question:
    expected = answer.removesuffix(tokenizer.eos_token) if tokenizer.eos_token else answer
    return Question(tokenizer.tokenize(before), tokenizer.tokenize(answer), expected)


def _length(message: Message) -> int:
    """The number of characters of an answer, independent of any chat template."""
    calls = [call.function for call in message.tool_calls or ()]
    return len((message.content or "").strip()) + sum(len(call.name) + len(call.arguments) for call in calls)


def _answers(eval_set: EvalSet, rows: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    return [
        {
            "expected": [question.expected for question in eval_set.by_model["candidate"][number]],
            "bits_per_character": {
                role: model_rows[number]["nats"] / math.log(2) / length for role, model_rows in rows.items()
            },
            "answers": {role: model_rows[number]["answers"] for role, model_rows in rows.items()},
        }
        for number, length in enumerate(eval_set.characters)
    ]


def _measure_all(
    context: Context,
    spec: CompareSpec,
    measured: Measurements,
    eval_set: EvalSet,
    role: str,
    file: str,
    tokenizer: GgufTokenizer,
) -> None:
    """Measure one model on the samples that were not measured yet."""
    questions = eval_set.by_model[role]
    if not measured.needs_more(role, len(questions)):
        return
    max_length = max(
        len(question.prompt) + max(len(question.answer), spec.max_new_tokens)
        for sample_questions in questions
        for question in sample_questions
    )
    threads = max(1, int(outputs.own_job(context.job_id).resources["cpus"]))
    with GgufModel(file, min(tokenizer.context_length, max_length), threads) as model:

        def measure_sample(number: int) -> list[Row]:
            return [_measure(model, tokenizer, questions[number], spec.max_new_tokens, context.should_stop)]

        measured.measure_missing(role, len(questions), measure_sample)


def _measure(
    model: GgufModel,
    tokenizer: GgufTokenizer,
    questions: Sequence[Question],
    max_new_tokens: int,
    should_stop: Callable[[], bool],
) -> Row:
    if should_stop():
        raise MeasurementInterrupted
    nats = sum(sum(_losses(model, question)) for question in questions)
    answers: list[str] = []
    for question in questions:
        generated = model.generate(question.prompt, max_new_tokens, should_stop)
        if generated is None:
            raise MeasurementInterrupted
        answers.append(tokenizer.decode(generated))
    return {"nats": nats, "answers": answers}


def _losses(model: GgufModel, question: Question) -> Iterator[float]:
    """The loss of each token of the expected answer, in nats."""
    import numpy

    ids = [*question.prompt, *question.answer]
    positions = range(len(question.prompt) - 1, len(ids) - 1)
    for row, token in zip(model.logits(ids, positions), question.answer, strict=True):
        logits = row.astype(numpy.float64)
        highest = logits.max()
        yield float(highest + numpy.log(numpy.exp(logits - highest).sum()) - logits[token])
