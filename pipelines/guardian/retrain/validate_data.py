"""The kind `validate_data`: count the data of a training and write its data card, before hours are spent on it.

It fails if there is too little data, or if held-out samples are also in the training data.
"""

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

from jinja2 import TemplateError
from pydantic import Field

from cluster.errors import UnprocessableRequest
from cluster.settings import get_settings
from jobs.context import Context
from jobs.registry import Resources, job
from pipelines.training.data import datasets
from pipelines.training.data.datasets import Dataset
from pipelines.training.data.parsing import read_lines, read_samples
from pipelines.training.data.samples import Sample, Source
from pipelines.training.fine_tune.preprocess import context_length
from pipelines.training.fine_tune.tokenize import render
from pipelines.training.models import base_models
from pipelines.training.spec import Spec

CARD, CARD_JSON = "data_card.md", "data_card.json"
MAX_TOKENIZED_SAMPLES = 5000
"""Tokens are counted in at most this many samples of a dataset, evenly selected."""
REPORT_EVERY = 200


class ValidateDataSpec(Spec):
    """The datasets of a training, and the limits that they must meet."""

    train: str = Field(max_length=200, description="The dataset to train on.")
    held_out: str | None = Field(max_length=200, description="The held-out dataset. Null: there is none.")
    base_model: str = Field(
        default="forgearr/tiny", min_length=1, max_length=300, description="The model whose tokens are counted."
    )
    min_samples: int | None = Field(default=None, ge=1, description="Null: guardian.min_samples of the settings.")


class TooLittleData(UnprocessableRequest):
    """There is too little data to train on."""

    code = "TOO_LITTLE_DATA"


class HeldOutLeaked(UnprocessableRequest):
    """Held-out samples are in the training data too, so nothing could be measured on them."""

    code = "HELD_OUT_LEAKED"


@dataclass
class DatasetStats:
    """The counts of one dataset."""

    characters: list[int] = field(default_factory=list[int])
    tokens: list[int] = field(default_factory=list[int])
    kinds: Counter[str] = field(default_factory=Counter[str])
    samples: set[bytes] = field(default_factory=set[bytes])  # digests
    questions: set[bytes] = field(default_factory=set[bytes])
    answers: set[bytes] = field(default_factory=set[bytes])
    files: set[str] = field(default_factory=set[str])
    too_long: int = 0

    @property
    def duplicates(self) -> int:
        return len(self.characters) - len(self.samples)


@job("validate_data", spec=ValidateDataSpec, resources=Resources(cpus=1), tracked=True, admin_only=True)
def validate_data(context: Context, spec: ValidateDataSpec) -> dict[str, Any]:
    """Counts the data of a training, writes a data card, and fails if the data cannot be used."""
    named = {"train": spec.train, "held_out": spec.held_out}
    datasets_by_part = {part: datasets.get(name) for part, name in named.items() if name is not None}
    for name, dataset in datasets_by_part.items():
        context.input(f"{dataset.name} ({name})", dataset.digest, dataset.address, samples=dataset.samples)
    parts = {name: _count(context, name, dataset, spec.base_model) for name, dataset in datasets_by_part.items()}
    parts.setdefault("held_out", DatasetStats())
    min_samples = spec.min_samples or get_settings().guardian.min_samples
    report: dict[str, Any] = {**summarize(parts, min_samples), "base_model": spec.base_model}
    with tempfile.TemporaryDirectory(prefix="forgearr-card-") as folder:
        files = write_card(report, datasets_by_part, Path(folder))
        addresses = {path.name: context.artifact(path) for path in files}
    numbers = {f"{name}_samples": report[name]["samples"] for name in parts}
    context.report(progress=100, phase="counted", **numbers, leaked=report["leaked"])
    require_usable(report)
    return {**report, "card": addresses[CARD]}


def count_sample(sample: Sample, stats: DatasetStats) -> None:
    document = sample.model_dump(exclude_none=True, include={"messages", "tools"})
    messages = document["messages"]
    questions = [message for message in messages if message["role"] != "assistant"]
    answers = [message for message in messages if message["role"] == "assistant"]
    stats.characters.append(sum(len(message.get("content") or "") for message in messages))
    stats.samples.add(_digest(document))
    stats.questions.add(_digest(questions))
    stats.answers.add(_digest(answers))
    source = sample.source or Source()
    stats.kinds[source.kind or "other"] += 1
    if source.path is not None:
        stats.files.add(source.path)


def summarize(parts: Mapping[str, DatasetStats], min_samples: int) -> dict[str, Any]:
    """All numbers, and the reasons why there is too little data, if so."""
    train, held_out = parts["train"], parts["held_out"]
    report: dict[str, Any] = {name: _numbers(part) for name, part in parts.items()}
    report["leaked"] = len(train.samples & held_out.samples)
    report["shared"] = {
        "questions": len(train.questions & held_out.questions),
        "answers": len(train.answers & held_out.answers),
        "files": len(train.files & held_out.files),
    }
    report["min_samples"] = min_samples
    reasons: list[str] = []
    if len(train.samples) < min_samples:
        reasons.append(
            f"there are {len(train.samples)} different samples to train on, and at least {min_samples} are required"
        )
    if not held_out.samples:
        reasons.append("there are no held-out samples")
    return {**report, "enough": not reasons, "reasons": reasons}


def require_usable(report: Mapping[str, Any]) -> None:
    if not report["enough"]:
        raise TooLittleData(f"Too little data: {'; '.join(report['reasons'])}.", details=dict(report))
    if report["leaked"]:
        raise HeldOutLeaked(
            f"{report['leaked']} of {report['held_out']['samples']} held-out samples are in the training data too, so "
            "nothing could be measured on them.",
            details=dict(report),
        )


def write_card(report: Mapping[str, Any], datasets_by_part: Mapping[str, Dataset], folder: Path) -> list[Path]:
    """Write the data card as Markdown for people, and as JSON for programs."""
    names = {name: f"{dataset.name}:v{dataset.version}" for name, dataset in datasets_by_part.items()}
    kinds = sorted({*report["train"]["kinds"], *report["held_out"]["kinds"]})
    rows = [
        ("Samples", "samples"),
        ("Duplicates", "duplicates"),
        ("Source files", "files"),
        ("Characters, median", "characters.median"),
        ("Characters, maximum", "characters.max"),
        ("Tokens, median", "tokens.median"),
        ("Tokens, maximum", "tokens.max"),
        ("Longer than the model's context", "too_long"),
    ]
    measured_on = names.get("held_out", "nothing")
    lines = [
        f"# {names['train']}",
        "",
        f"Trained on {names['train']}, measured on {measured_on}, in tokens of {report['base_model']}.",
        "",
        *[f"- {reason[0].upper()}{reason[1:]}." for reason in report["reasons"]],
        *([""] if report["reasons"] else []),
        "| | training | held out |",
        "|---|---|---|",
        *[f"| {title} | {_cell(report['train'], key)} | {_cell(report['held_out'], key)} |" for title, key in rows],
        "",
        f"In both: {report['leaked']} samples, {report['shared']['questions']} questions, "
        f"{report['shared']['answers']} answers, {report['shared']['files']} files.",
        "",
        "| Kind | training | held out |",
        "|---|---|---|",
        *[f"| {kind} | {_share(report['train'], kind)} | {_share(report['held_out'], kind)} |" for kind in kinds],
        "",
    ]
    card, document = folder / CARD, folder / CARD_JSON
    card.write_text("\n".join(lines))
    document.write_text(json.dumps({**report, "datasets": names}, indent=2))
    return [card, document]


def _count(context: Context, name: str, dataset: Dataset, base_model: str) -> DatasetStats:
    """Count in one pass over the file, which may be larger than memory."""
    from transformers import AutoTokenizer

    base = base_models.resolve(base_model, context.owner_id)
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    limit = context_length(base, tokenizer)
    stats = DatasetStats()
    every = -(-dataset.samples // MAX_TOKENIZED_SAMPLES) or 1
    for number, sample in enumerate(_samples(dataset)):
        count_sample(sample, stats)
        if number % every == 0 and (tokens := _tokens(tokenizer, sample)) is not None:
            stats.tokens.append(tokens)
            stats.too_long += tokens > limit
        if number % REPORT_EVERY == 0:
            first = 0 if name == "train" else 90
            share = 90 if name == "train" else 10
            context.report(progress=first + share * number / max(dataset.samples, 1), phase=f"counting: {name}")
            if context.should_stop():
                context.checkpoint(None)
    return stats


def _samples(dataset: Dataset) -> Iterator[Sample]:
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="forgearr-dataset-"))
        file = stack.enter_context(datasets.fetch(dataset, Path(folder)).open("rb"))
        for sample in read_samples(read_lines(file), dataset.name):
            if isinstance(sample, Sample):
                yield sample


def _tokens(tokenizer: Any, sample: Sample) -> int | None:
    """The tokens of a sample; None if the chat template cannot render it, which the training will report."""
    document = sample.model_dump(exclude_none=True, include={"messages", "tools"})
    try:
        text = render(tokenizer, document["messages"], document.get("tools"))
    except TemplateError:
        return None
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _numbers(stats: DatasetStats) -> dict[str, Any]:
    return {
        "samples": len(stats.characters),
        "duplicates": stats.duplicates,
        "files": len(stats.files),
        "characters": _statistics(stats.characters),
        "tokens": {**_statistics(stats.tokens), "counted_in": len(stats.tokens)},
        "too_long": stats.too_long,
        "kinds": {kind: number / len(stats.characters) for kind, number in stats.kinds.most_common()},
    }


def _statistics(numbers: Sequence[int]) -> dict[str, float | None]:
    if not numbers:
        return {"min": None, "median": None, "mean": None, "max": None, "total": 0}
    middle, average = median(numbers), round(mean(numbers), 1)
    return {"min": min(numbers), "median": middle, "mean": average, "max": max(numbers), "total": sum(numbers)}


def _cell(numbers: Any, key: str) -> str:
    for name in key.split("."):
        numbers = numbers[name]
    return "" if numbers is None else f"{numbers:g}"


def _share(numbers: Mapping[str, Any], kind: str) -> str:
    return f"{numbers['kinds'].get(kind, 0):.1%}"


def _digest(value: Any) -> bytes:
    """A digest that ignores spaces and case."""
    plain = " ".join(json.dumps(value, sort_keys=True, ensure_ascii=False).lower().replace("\\n", " ").split())
    return hashlib.blake2b(plain.encode(), digest_size=16).digest()
