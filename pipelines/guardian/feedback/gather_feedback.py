"""The kind `gather_feedback`: turn feedback on a model's answers into prompts, and all such prompts into datasets."""

import asyncio
import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import Field

from cluster.db import Database, run_with_database
from cluster.ownership import LOCAL
from jobs.context import Context
from jobs.registry import job
from pipelines.guardian.feedback import store as feedback_store
from pipelines.guardian.feedback.store import FeedbackFilter
from pipelines.training.data import content as data_content
from pipelines.training.data import datasets, prompts
from pipelines.training.data.datasets import Dataset
from pipelines.training.data.parsing import EmptyData, read_lines, read_samples
from pipelines.training.data.samples import PreferencePair, Sample
from pipelines.training.spec import ModelName, PromptFilter, Spec

HELD_OUT_EVERY = 10
"""About one question of this many is held out, always the same ones."""


class GatherFeedbackSpec(Spec):
    """The model whose feedback is used, and datasets to add it to."""

    model: ModelName
    train: str | None = Field(default=None, max_length=200, description="A dataset for training, to add to.")
    held_out: str | None = Field(default=None, max_length=200, description="Its held-out dataset, to add to.")


@job("gather_feedback", spec=GatherFeedbackSpec, admin_only=True)
def gather_feedback(context: Context, spec: GatherFeedbackSpec) -> dict[str, Any]:
    """Turns the feedback on a model into training prompts, and all such prompts into datasets."""
    context.report(phase="turning feedback into prompts")
    learned, conversations = run_with_database(lambda database: _prompts(database, spec.model))
    if not conversations and spec.train is None:
        raise EmptyData(f"There is no feedback on {spec.model} that could be trained on.")
    train, held_out = split(conversations)
    context.report(progress=30, phase="writing datasets")
    created = run_with_database(lambda database: _datasets(database, spec, train, held_out))
    parts = {name: {"dataset": dataset.id, "samples": dataset.samples} for name, dataset in created.items()}
    return {"model": spec.model, "prompts": len(conversations), "new_prompts": learned, **parts}


def split(conversations: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Split samples into those for training and the held-out ones. All answers to a question are on the same side."""
    by_question: dict[int, list[Sample]] = {}
    for sample in conversations:
        by_question.setdefault(_question_hash(sample), []).append(sample)
    held_out = [question for question in sorted(by_question) if question % HELD_OUT_EVERY == 0]
    if not held_out and len(by_question) > 1:
        held_out = [min(by_question)]
    if len(held_out) == len(by_question):
        held_out = held_out[1:]  # at least one question is for training
    train = [sample for question, samples in by_question.items() if question not in held_out for sample in samples]
    return train, [sample for question in held_out for sample in by_question[question]]


async def _prompts(database: Database, model: str) -> tuple[int, list[Sample]]:
    all_owners = feedback_store.trusts_everybody()
    filters = FeedbackFilter(model=model, tags=["feedback", model], all_owners=all_owners)
    learned = 0
    while True:
        async with database.transaction() as session:
            result = await feedback_store.learn(session, filters, LOCAL)
            learned += len(result.prompt_ids)
        if not result.remaining:
            break
    async with database.read_transaction() as session:
        ids = list(await session.scalars(feedback_store.learned_prompts(model)))
        return learned, await prompts.load_samples(session, PromptFilter(ids=ids), LOCAL) if ids else []


async def _datasets(
    database: Database, spec: GatherFeedbackSpec, train: Sequence[Sample], held_out: Sequence[Sample]
) -> dict[str, Dataset]:
    """Store both datasets, each with the base that the spec names. Held-out samples are removed from the training."""
    held_out_ids: set[bytes] = set()

    def hold_out(sample: Sample | PreferencePair) -> bool:
        held_out_ids.add(_identity(sample))
        return True

    def is_learnable(sample: Sample | PreferencePair) -> bool:
        return _identity(sample) not in held_out_ids

    created: dict[str, Dataset] = {}
    with tempfile.TemporaryDirectory(prefix="forgearr-feedback-") as folder:
        for part, base_reference, own, is_included in (
            ("held_out", spec.held_out, held_out, hold_out),
            ("train", spec.train, train, is_learnable),
        ):
            base = await _find(database, base_reference) if base_reference else None
            samples = filter(is_included, chain(_samples(base, Path(folder)), own))
            name = f"feedback/{spec.model[:80]}/{part.replace('_', '-')}"
            path = Path(folder) / f"{part}.jsonl"
            content = await asyncio.to_thread(data_content.write_samples, samples, path, name)
            source = {"feedback": spec.model, "prompts": len(own), "beside": base_reference}
            created[part] = await datasets.store_dataset(database, name, content, source, LOCAL)
    return {"train": created["train"], "held_out": created["held_out"]}


async def _find(database: Database, reference: str) -> Dataset:
    async with database.read_transaction() as session:
        return await datasets.find(session, reference, LOCAL)


def _samples(dataset: Dataset | None, folder: Path) -> Iterator[Sample | PreferencePair]:
    if dataset is None:
        return
    download_folder = folder / dataset.id
    download_folder.mkdir()
    with datasets.fetch(dataset, download_folder).open("rb") as file:
        yield from read_samples(read_lines(file), dataset.name)


def _question_hash(sample: Sample) -> int:
    """A hash of the first question that never changes."""
    question = next(message.content or "" for message in sample.messages if message.role == "user")
    return int.from_bytes(hashlib.sha256(question.strip().encode()).digest()[:8])


def _identity(sample: Sample | PreferencePair) -> bytes:
    """A digest of the sample without its source."""
    document = sample.model_dump_json(include={"messages", "tools", "chosen", "rejected"})
    return hashlib.blake2b(document.encode(), digest_size=16).digest()
