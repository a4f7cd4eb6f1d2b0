"""The kind `compare`: the promotion gate. A new version beside the one that is served, on the same unseen questions.

Both are what would really answer: GGUF files, each with its own words and its own chat template. Two tokenizers split a
text into different tokens, so what is compared is the loss per character of the expected answers, in bits.
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
from pipelines.training.fine_tune.preprocess import HELD_OUT
from pipelines.training.fine_tune.tokenize import UnusableTokenizer, turns
from pipelines.training.models import registry
from pipelines.training.models.versions import ModelNotFound, Version
from pipelines.training.spec import JobId, ModelName, Spec
from pipelines.training.validate import metrics as eval_metrics
from pipelines.training.validate import progress as eval_progress
from pipelines.training.validate.gguf_model import GgufModel
from pipelines.training.validate.gguf_tokenizer import GgufWords
from pipelines.training.validate.job import NothingHeldOut
from pipelines.training.validate.metrics import Interrupted
from pipelines.training.validate.progress import Measurements, Row

REPORT = "comparison.json"
TITLES = {"served": "version that is served", "candidate": "candidate"}


class CompareSpec(Spec):
    """Put a version beside the one that is served."""

    name: ModelName
    version: int = Field(ge=1)
    job_id: JobId = Field(description="The fine_tune job whose held-out samples are the questions.")
    max_samples: int = Field(default=100, ge=1, le=100_000)
    max_new_tokens: int = Field(default=128, ge=1, le=4096, description="How long generated answers may be.")
    min_improvement: float | None = Field(
        default=None, ge=0, lt=1, description="Null: guardian.min_improvement of the settings."
    )


class NothingComparable(UnprocessableRequest):
    """No held-out sample can be told to both models."""

    code = "NOTHING_COMPARABLE"


@dataclass(frozen=True)
class Question:
    """One of the assistant's answers, as one of the models reads and writes it."""

    prompt: list[int]
    answer: list[int]
    expected: str


@dataclass(frozen=True)
class Asked:
    """The same samples as each model reads them."""

    by_model: dict[str, list[list[Question]]]
    characters: list[int]  # of the expected answers of each sample
    left_out: int  # samples that one of the models cannot read


@job("compare", spec=CompareSpec, resources=Resources(cpus=1), admin_only=True, tracked=True)
def compare(context: Context, spec: CompareSpec) -> dict[str, Any]:
    """Compares a new version of a model with the one that is served, and says whether it should take its place."""
    state: dict[str, Any] = context.checkpoint_state or {}
    result = state.get("result") or _compare(context, spec)
    eval_progress.settle(context, result)
    numbers = {
        f"{which}_{name}": value for which, told in result["metrics"].items() for name, value in (told or {}).items()
    }
    context.report(progress=100, phase="promoted" if result["promoted"] else "a candidate", **numbers)
    return result


def spread(conversations: Sequence[Sample], most: int) -> list[Sample]:
    """So many of them, from beginning to end: neighbours are often of one file."""
    if len(conversations) <= most:
        return list(conversations)
    return [conversations[number * len(conversations) // most] for number in range(most)]


def prepare(conversations: Sequence[Sample], words: Mapping[str, GgufWords]) -> Asked:
    """The samples that all models can read whole, as each of them reads them."""
    by_model: dict[str, list[list[Question]]] = {which: [] for which in words}
    characters: list[int] = []
    for sample in conversations:
        read = {which: _questions(sample, own) for which, own in words.items()}
        length = sum(_length(message) for message in sample.messages if message.role == "assistant")
        if length and all(read.values()):
            characters.append(length)
            for which, questions in read.items():
                by_model[which].append(questions)
    if not characters:
        raise NothingComparable(
            f"None of the {len(conversations)} held-out samples can be told whole to {' and '.join(words)}: they are "
            "longer than what the models read at once, or their chat templates cannot tell them."
        )
    return Asked(by_model, characters, len(conversations) - len(characters))


def summarize(asked: Asked, rows: Sequence[Row], which: str) -> dict[str, float]:
    nats = sum(row["nats"] for row in rows)
    scores = [
        eval_metrics.score(answer, question.expected)
        for questions, row in zip(asked.by_model[which], rows, strict=True)
        for question, answer in zip(questions, row["answers"], strict=True)
    ]
    return {
        "bits_per_character": nats / math.log(2) / sum(asked.characters),
        "rouge_l": sum(score["rouge_l"] for score in scores) / len(scores),
        "exact_match": sum(score["exact"] for score in scores) / len(scores),
    }


def judge(
    new: Version,
    served: Version | None,
    metrics: Mapping[str, Mapping[str, float]],
    least: float,
    refusal: str | None = None,
) -> tuple[bool, float | None, str]:
    """Whether the new version takes the place of the one served, by how much it is better, and why."""
    if refusal is not None:
        return False, None, refusal
    if served is None:
        return True, None, f"No version of {new.name} is served, and {new.reference} passed its validation."
    bits, before = (metrics[which]["bits_per_character"] for which in ("candidate", "served"))
    improvement = 1 - bits / before if before else 0.0
    told = (
        f"{new.reference} needs {bits:.4g} bits per character of the held-out answers, {served.reference}, which is "
        f"served, {before:.4g}: {abs(improvement):.1%} {'fewer' if improvement >= 0 else 'more'}"
    )
    is_better = improvement >= least and improvement > 0
    return is_better, improvement, f"{told}{'.' if is_better else f', and at least {least:.1%} fewer are wanted.'}"


def _compare(context: Context, spec: CompareSpec) -> dict[str, Any]:
    new, served = asyncio.run(_versions(spec))
    least = get_settings().guardian.min_improvement if spec.min_improvement is None else spec.min_improvement
    refusal = _refusal(new, served)
    beside = served if served and served.number != new.number and not served.is_adapter else None
    conversations = spread(_held_out(spec.job_id, context.owner_id), spec.max_samples)
    with workspace.folder(context.job_id) as place, ExitStack() as closing:
        context.report(progress=0, phase="fetching the models")
        files = asyncio.run(_fetch([version for version in (beside, new) if version is not None]))
        versions = {"candidate": new, **({"served": beside} if beside else {})}
        words = {
            which: closing.enter_context(GgufWords(str(files[version.reference]), version.manner.template))
            for which, version in versions.items()
        }
        asked = prepare(conversations, words)
        total = len(asked.characters) * len(versions)
        measured = Measurements(context, place, total, TITLES, {"served": beside.reference if beside else None})
        for which, version in versions.items():
            _measure_all(context, spec, measured, asked, which, str(files[version.reference]), words[which])
        metrics = {which: summarize(asked, measured.rows[which], which) for which in versions}
        promoted, improvement, reason = judge(new, served, metrics, least, refusal)
        verdict = {
            "name": new.name,
            "version": new.number,
            "served": served.number if served else None,
            "promoted": promoted,
            "reason": reason,
            "improvement": improvement,
            "min_improvement": least,
            "questions": sum(len(questions) for questions in asked.by_model["candidate"]),
            "left_out": asked.left_out,
            "metrics": {which: metrics.get(which) for which in ("candidate", "served")},
        }
        report = place / REPORT
        report.write_text(json.dumps({**verdict, "answers": _answers(asked, measured.rows)}, indent=2))
        address = context.artifact(report)
    asyncio.run(_remember(new, verdict))
    return {**verdict, "report": address}


def _refusal(new: Version, served: Version | None) -> str | None:
    """Why it is not promoted, whatever is measured."""
    if new.passed is not True:
        why = "; ".join(new.reasons) if new.passed is False else "it was never validated"
        return f"{new.reference} did not pass its validation: {why}."
    if served is None:
        return None
    if served.number == new.number:
        return f"{new.reference} is what is served already."
    if served.is_adapter:
        return f"{served.reference}, which is served, is an adapter, which cannot be measured by itself."
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


async def _remember(new: Version, verdict: Mapping[str, Any]) -> None:
    async with registry.connect() as models:
        await models.remember_comparison(new.name, new.number, verdict)


def _held_out(job_id: str, owner_id: str | None) -> list[Sample]:
    made = outputs.of(job_id, "fine_tune", owner_id)
    address = f"{made.result['model']}/{HELD_OUT}"
    text = storage.read(address) if storage.exists(address) else b""
    if not text.strip():
        raise NothingHeldOut(f"{made.job_id} has held no samples out, so there is nothing to compare on.")
    return [sample for sample in parsing.parse(text, HELD_OUT) if isinstance(sample, Sample)]


def _questions(sample: Sample, words: GgufWords) -> list[Question]:
    """Nothing, when the model cannot read the sample whole."""
    document = sample.model_dump(exclude_none=True)
    try:
        told = turns(words, document["messages"], document.get("tools"))
    except (TemplateError, UnusableTokenizer):
        return []
    questions = [_question(words, before, answer) for before, answer in told]
    fits = all(
        one.prompt and one.expected.strip() and len(one.prompt) + len(one.answer) <= words.context for one in questions
    )
    return questions if fits else []


def _question(words: GgufWords, before: str, answer: str) -> Question:
    expected = answer.removesuffix(words.eos_token) if words.eos_token else answer
    return Question(words.tokenize(before), words.tokenize(answer), expected)


def _length(message: Message) -> int:
    """How many characters an answer has, in whatever words a template tells it."""
    calls = [call.function for call in message.tool_calls or ()]
    return len((message.content or "").strip()) + sum(len(call.name) + len(call.arguments) for call in calls)


def _answers(asked: Asked, rows: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    return [
        {
            "expected": [question.expected for question in asked.by_model["candidate"][number]],
            "bits_per_character": {which: own[number]["nats"] / math.log(2) / length for which, own in rows.items()},
            "answers": {which: own[number]["answers"] for which, own in rows.items()},
        }
        for number, length in enumerate(asked.characters)
    ]


def _measure_all(
    context: Context, spec: CompareSpec, measured: Measurements, asked: Asked, which: str, file: str, words: GgufWords
) -> None:
    """One model, on what is missing."""
    questions = asked.by_model[which]
    if not measured.lacks(which, len(questions)):
        return
    longest = max(len(one.prompt) + max(len(one.answer), spec.max_new_tokens) for some in questions for one in some)
    threads = max(1, int(outputs.own_row(context.job_id).resources["cpus"]))
    with GgufModel(file, min(words.context, longest), threads) as model:

        def measure_one(number: int) -> list[Row]:
            return [_measure(model, words, questions[number], spec.max_new_tokens, context.should_stop)]

        measured.follow(which, len(questions), measure_one)


def _measure(
    model: GgufModel, words: GgufWords, questions: Sequence[Question], most: int, should_stop: Callable[[], bool]
) -> Row:
    if should_stop():
        raise Interrupted
    nats = sum(sum(_losses(model, question)) for question in questions)
    answers: list[str] = []
    for question in questions:
        said = model.generate(question.prompt, most, should_stop)
        if said is None:
            raise Interrupted
        answers.append(words.text_of(said))
    return {"nats": nats, "answers": answers}


def _losses(model: GgufModel, question: Question) -> Iterator[float]:
    """Of each token of the expected answer, in nats."""
    import numpy

    ids = [*question.prompt, *question.answer]
    positions = range(len(question.prompt) - 1, len(ids) - 1)
    for row, token in zip(model.logits(ids, positions), question.answer, strict=True):
        told = row.astype(numpy.float64)
        highest = told.max()
        yield float(highest + numpy.log(numpy.exp(told - highest).sum()) - told[token])
