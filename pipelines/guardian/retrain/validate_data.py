"""The kind `validate_data`: what a model is about to learn from, counted, before anybody spends hours on it.

Too little of it, or a held-out part that is no secret, ends the plan here, with the numbers.
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
from pipelines.training.data.parsing import lines_of, read
from pipelines.training.data.samples import Sample, Source
from pipelines.training.fine_tune.preprocess import context_of
from pipelines.training.fine_tune.tokenize import render
from pipelines.training.models import base_models
from pipelines.training.spec import Spec

CARD, CARD_JSON = "data_card.md", "data_card.json"
TOKENIZED = 5000
"""In how many samples of a part, from its beginning to its end, tokens are counted."""
LOOK_EVERY = 200


class ExamineSpec(Spec):
    """Look through the data of a training."""

    train: str = Field(max_length=200, description="A dataset.")
    held_out: str | None = Field(max_length=200, description="The dataset that it is measured on. Null: there is none.")
    base_model: str = Field(default="forgearr/tiny", min_length=1, max_length=300, description="Whose tokens to count.")
    min_samples: int | None = Field(default=None, ge=1, description="Null: guardian.min_samples of the settings.")


class TooLittleData(UnprocessableRequest):
    """There is too little data to learn from."""

    code = "TOO_LITTLE_DATA"


class HeldOutLeaked(UnprocessableRequest):
    """Samples that are held out are learned too, so nothing could be measured on them."""

    code = "HELD_OUT_LEAKED"


@dataclass
class Part:
    """What has been counted of one dataset."""

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


@job("validate_data", spec=ExamineSpec, resources=Resources(cpus=1), tracked=True, admin_only=True)
def validate_data(context: Context, spec: ExamineSpec) -> dict[str, Any]:
    """Counts what a model is about to learn from, writes a data card, and stops what would come to nothing."""
    named = {"train": spec.train, "held_out": spec.held_out}
    found = {part: datasets.get(name) for part, name in named.items() if name is not None}
    for name, dataset in found.items():
        context.input(f"{dataset.name} ({name})", dataset.digest, dataset.address, samples=dataset.samples)
    parts = {name: _count(context, name, dataset, spec.base_model) for name, dataset in found.items()}
    parts.setdefault("held_out", Part())
    least = spec.min_samples or get_settings().guardian.min_samples
    told: dict[str, Any] = {**describe(parts, least), "base_model": spec.base_model}
    with tempfile.TemporaryDirectory(prefix="forgearr-card-") as folder:
        files = write_card(told, found, Path(folder))
        addresses = {path.name: context.artifact(path) for path in files}
    numbers = {f"{name}_samples": told[name]["samples"] for name in parts}
    context.report(progress=100, phase="counted", **numbers, leaked=told["leaked"])
    refuse(told)
    return {**told, "card": addresses[CARD]}


def count(sample: Sample, part: Part) -> None:
    document = sample.model_dump(exclude_none=True, include={"messages", "tools"})
    messages = document["messages"]
    asked = [message for message in messages if message["role"] != "assistant"]
    said = [message for message in messages if message["role"] == "assistant"]
    part.characters.append(sum(len(message.get("content") or "") for message in messages))
    part.samples.add(_digest(document))
    part.questions.add(_digest(asked))
    part.answers.add(_digest(said))
    source = sample.source or Source()
    part.kinds[source.kind or "other"] += 1
    if source.path is not None:
        part.files.add(source.path)


def describe(parts: Mapping[str, Part], least: int) -> dict[str, Any]:
    """All numbers, and why there is nothing to learn from, if so."""
    train, held_out = parts["train"], parts["held_out"]
    told: dict[str, Any] = {name: _numbers(part) for name, part in parts.items()}
    told["leaked"] = len(train.samples & held_out.samples)
    told["shared"] = {
        "questions": len(train.questions & held_out.questions),
        "answers": len(train.answers & held_out.answers),
        "files": len(train.files & held_out.files),
    }
    told["min_samples"] = least
    reasons: list[str] = []
    if len(train.samples) < least:
        reasons.append(
            f"there are {len(train.samples)} different samples to learn from, and at least {least} are wanted"
        )
    if not held_out.samples:
        reasons.append("no sample is held out to measure on")
    return {**told, "enough": not reasons, "reasons": reasons}


def refuse(told: Mapping[str, Any]) -> None:
    if not told["enough"]:
        raise TooLittleData(f"Too little data: {'; '.join(told['reasons'])}.", details=dict(told))
    if told["leaked"]:
        raise HeldOutLeaked(
            f"{told['leaked']} of {told['held_out']['samples']} held-out samples are learned too, so nothing could be "
            "measured on them.",
            details=dict(told),
        )


def write_card(told: Mapping[str, Any], found: Mapping[str, Dataset], folder: Path) -> list[Path]:
    """The data card, for people and for programs."""
    names = {name: f"{dataset.name}:v{dataset.version}" for name, dataset in found.items()}
    kinds = sorted({*told["train"]["kinds"], *told["held_out"]["kinds"]})
    rows = [
        ("Samples", "samples"),
        ("Duplicates", "duplicates"),
        ("Files they are from", "files"),
        ("Characters, in the middle", "characters.median"),
        ("Characters, at most", "characters.max"),
        ("Tokens, in the middle", "tokens.median"),
        ("Tokens, at most", "tokens.max"),
        ("Longer than the model reads at once", "too_long"),
    ]
    measured_on = names.get("held_out", "nothing")
    lines = [
        f"# {names['train']}",
        "",
        f"Learned from {names['train']}, measured on {measured_on}, in tokens of {told['base_model']}.",
        "",
        *[f"- {reason[0].upper()}{reason[1:]}." for reason in told["reasons"]],
        *([""] if told["reasons"] else []),
        "| | learned | held out |",
        "|---|---|---|",
        *[f"| {title} | {_cell(told['train'], key)} | {_cell(told['held_out'], key)} |" for title, key in rows],
        "",
        f"In both: {told['leaked']} samples, {told['shared']['questions']} questions, {told['shared']['answers']} "
        f"answers, {told['shared']['files']} files.",
        "",
        "| Kind | learned | held out |",
        "|---|---|---|",
        *[f"| {kind} | {_share(told['train'], kind)} | {_share(told['held_out'], kind)} |" for kind in kinds],
        "",
    ]
    card, document = folder / CARD, folder / CARD_JSON
    card.write_text("\n".join(lines))
    document.write_text(json.dumps({**told, "datasets": names}, indent=2))
    return [card, document]


def _count(context: Context, name: str, dataset: Dataset, base_model: str) -> Part:
    """One pass over the file, which may be larger than memory."""
    from transformers import AutoTokenizer

    base = base_models.folder(base_model)
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    limit = context_of(base, tokenizer)
    part = Part()
    every = -(-dataset.samples // TOKENIZED) or 1
    for number, sample in enumerate(_samples(dataset)):
        count(sample, part)
        if number % every == 0 and (tokens := _tokens(tokenizer, sample)) is not None:
            part.tokens.append(tokens)
            part.too_long += tokens > limit
        if number % LOOK_EVERY == 0:
            first = 0 if name == "train" else 90
            share = 90 if name == "train" else 10
            context.report(progress=first + share * number / max(dataset.samples, 1), phase=f"counting: {name}")
            if context.should_stop():
                context.checkpoint(None)
    return part


def _samples(dataset: Dataset) -> Iterator[Sample]:
    with ExitStack() as closing:
        folder = closing.enter_context(tempfile.TemporaryDirectory(prefix="forgearr-dataset-"))
        file = closing.enter_context(datasets.fetch(dataset, Path(folder)).open("rb"))
        for sample in read(lines_of(file), dataset.name):
            if isinstance(sample, Sample):
                yield sample


def _tokens(tokenizer: Any, sample: Sample) -> int | None:
    """None for what the base model's chat template cannot tell: the training will say so."""
    document = sample.model_dump(exclude_none=True, include={"messages", "tools"})
    try:
        text = render(tokenizer, document["messages"], document.get("tools"))
    except TemplateError:
        return None
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _numbers(part: Part) -> dict[str, Any]:
    return {
        "samples": len(part.characters),
        "duplicates": part.duplicates,
        "files": len(part.files),
        "characters": _spread(part.characters),
        "tokens": {**_spread(part.tokens), "counted_in": len(part.tokens)},
        "too_long": part.too_long,
        "kinds": {kind: number / len(part.characters) for kind, number in part.kinds.most_common()},
    }


def _spread(numbers: Sequence[int]) -> dict[str, float | None]:
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
    """Spaces and letters' case make no other sample."""
    plain = " ".join(json.dumps(value, sort_keys=True, ensure_ascii=False).lower().replace("\\n", " ").split())
    return hashlib.blake2b(plain.encode(), digest_size=16).digest()
