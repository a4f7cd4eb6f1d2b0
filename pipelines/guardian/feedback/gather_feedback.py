"""The kind `gather_feedback`: what people have said of a model's answers, as data to learn from."""

import asyncio
import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import Field
from sqlalchemy import select

from cluster.db import Database, apart
from jobs.context import Context
from jobs.registry import job
from pipelines.guardian.feedback import store as feedback_store
from pipelines.guardian.feedback.store import Feedback, FeedbackFilter
from pipelines.training.data import content as data_content
from pipelines.training.data import datasets, prompts
from pipelines.training.data.datasets import Dataset
from pipelines.training.data.parsing import EmptyData, lines_of, read
from pipelines.training.data.prompts import Prompt
from pipelines.training.data.samples import Pair, Sample
from pipelines.training.spec import ModelName, PromptFilter, Spec

HELD_OUT_EVERY = 10
"""One question in so many is not learned, and always the same ones."""


class GatherSpec(Spec):
    """Learn from the feedback on a model, beside other data if there is some."""

    model: ModelName
    train: str | None = Field(default=None, max_length=200, description="A dataset to learn from too.")
    held_out: str | None = Field(default=None, max_length=200, description="What is held out of that.")


@job("gather_feedback", spec=GatherSpec, admin_only=True)
def gather_feedback(context: Context, spec: GatherSpec) -> dict[str, Any]:
    """Turns the feedback on a model into training prompts, and all such prompts into data to learn from."""
    context.report(phase="turning feedback into prompts")
    learned, conversations = asyncio.run(apart(lambda database: _prompts(database, spec.model)))
    if not conversations and spec.train is None:
        raise EmptyData(f"There is no feedback on {spec.model} that anything could be learned from.")
    train, held_out = split(conversations)
    context.report(progress=30, phase="writing datasets")
    made = asyncio.run(apart(lambda database: _datasets(database, spec, train, held_out)))
    told = {name: {"dataset": dataset.id, "samples": dataset.samples} for name, dataset in made.items()}
    return {"model": spec.model, "prompts": len(conversations), "new_prompts": learned, **told}


def split(conversations: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """What is learned and what is held out. A question is on one side, whatever was answered to it."""
    by_question: dict[int, list[Sample]] = {}
    for sample in conversations:
        by_question.setdefault(_number(sample), []).append(sample)
    hidden = [number for number in sorted(by_question) if number % HELD_OUT_EVERY == 0]
    if not hidden and len(by_question) > 1:
        hidden = [min(by_question)]
    if len(hidden) == len(by_question):
        hidden = hidden[1:]  # something has to be learned
    train = [sample for number, some in by_question.items() if number not in hidden for sample in some]
    return train, [sample for number in hidden for sample in by_question[number]]


async def _prompts(database: Database, model: str) -> tuple[int, list[Sample]]:
    learned = 0
    while True:
        async with database.transaction() as session:
            some = await feedback_store.learn(session, FeedbackFilter(model=model, tags=["feedback", model]))
            learned += len(some.prompt_ids)
        if not some.left:
            break
    async with database.reading() as session:
        made = select(Prompt.id).join(Feedback, Feedback.prompt_id == Prompt.id).where(Feedback.model == model)
        ids = list(await session.scalars(made))
        return learned, await prompts.samples(session, PromptFilter(ids=ids)) if ids else []


async def _datasets(
    database: Database, spec: GatherSpec, train: Sequence[Sample], held_out: Sequence[Sample]
) -> dict[str, Dataset]:
    """Both parts, each beside what is there already. Nothing that one of them holds out is learned."""
    secret: set[bytes] = set()

    def hide(sample: Sample | Pair) -> bool:
        secret.add(_identity(sample))
        return True

    def is_open(sample: Sample | Pair) -> bool:
        return _identity(sample) not in secret

    made: dict[str, Dataset] = {}
    with tempfile.TemporaryDirectory(prefix="forgearr-feedback-") as folder:
        for part, beside, own, is_wanted in (
            ("held_out", spec.held_out, held_out, hide),
            ("train", spec.train, train, is_open),
        ):
            known = await _find(database, beside) if beside else None
            samples = filter(is_wanted, chain(_samples(known, Path(folder)), own))
            name = f"feedback/{spec.model[:80]}/{part.replace('_', '-')}"
            path = Path(folder) / f"{part}.jsonl"
            content = await asyncio.to_thread(data_content.write, samples, path, name)
            source = {"feedback": spec.model, "prompts": len(own), "beside": beside}
            made[part] = await datasets.keep(database, name, content, source)
    return {"train": made["train"], "held_out": made["held_out"]}


async def _find(database: Database, reference: str) -> Dataset:
    async with database.reading() as session:
        return await datasets.find(session, reference)


def _samples(dataset: Dataset | None, folder: Path) -> Iterator[Sample | Pair]:
    if dataset is None:
        return
    place = folder / dataset.id
    place.mkdir()
    with datasets.fetch(dataset, place).open("rb") as file:
        yield from read(lines_of(file), dataset.name)


def _number(sample: Sample) -> int:
    """Of a question, stable for good."""
    asked = next(message.content or "" for message in sample.messages if message.role == "user")
    return int.from_bytes(hashlib.sha256(asked.strip().encode()).digest()[:8])


def _identity(sample: Sample | Pair) -> bytes:
    """Wherever it is from."""
    told = sample.model_dump_json(include={"messages", "tools", "chosen", "rejected"})
    return hashlib.blake2b(told.encode(), digest_size=16).digest()
