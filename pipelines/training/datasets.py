"""Datasets: what training reads, whatever it was made from. One is a file of samples that never changes.

It is known by the hash of its lines: the same content under the same name of the same owner is the same dataset, and
new content under that name is its next version. Made from prompts or documents, it stays as it is when they change.
"""

import asyncio
import hashlib
import logging
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files as shipped_files
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from sqlalchemy import Index, Select, String, Text, func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from cluster import storage
from cluster.db import Base, Database, apart, now, one_at_a_time
from cluster.errors import Conflict, Forbidden, ForgearrError, InvalidRequest, NotFound
from cluster.identity import User
from cluster.settings import get_settings
from jobs import files
from jobs.files import File
from jobs.queue import LOCAL, Owner
from jobs.states import FINISHED
from jobs.tables import Job
from jobs.tables import Sequence as Counter
from pipelines.training import documents, prompts
from pipelines.training.samples import EmptyData, Pair, Sample, WrongKindOfData, line_of, lines_of, parse, read
from pipelines.training.spec import Data, FineTuneSpec

SHIPPED = "demo/homelab"
NAME = r"^[a-z0-9][a-z0-9._-]{0,99}$"
"""Of a dataset that somebody uploads. The names of others have a slash in them."""
NAME_MAX = 100
VERSION = re.compile(r":v([1-9][0-9]{0,8})\Z")

logger = logging.getLogger(__name__)


class DatasetNotFound(NotFound):
    """There is no such dataset."""

    code = "DATASET_NOT_FOUND"


class DatasetInUse(Conflict):
    """A job learns from this dataset."""

    code = "DATASET_IN_USE"


class DatasetDamaged(ForgearrError):
    """The file of a dataset is gone, or is not what it was."""

    code = "DATASET_DAMAGED"


class FolderForbidden(Forbidden):
    """Only an administrator may read this folder."""

    code = "FOLDER_FORBIDDEN"


class FolderNotFound(InvalidRequest):
    """There is no such folder."""

    code = "FOLDER_NOT_FOUND"


class NotToLearnFrom(InvalidRequest):
    """This file is not one to learn from."""

    code = "INVALID_TRAINING_FILE"


class Dataset(Base):
    __tablename__ = "datasets"
    __table_args__ = (Index("ix_datasets_name_version", "name", "version"),)

    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    name: Mapped[str] = mapped_column(String(NAME_MAX))
    version: Mapped[int]  # counts up within the owner and the name
    kind: Mapped[str] = mapped_column(String(12))  # chat or preference
    digest: Mapped[str] = mapped_column(String(64), index=True)  # SHA-256 of its lines
    samples: Mapped[int]
    bytes: Mapped[int] = mapped_column(Counter)
    address: Mapped[str] = mapped_column(Text)  # in storage; datasets with the same content share it
    source: Mapped[dict[str, Any]]  # what its first maker made it from
    owner_id: Mapped[str | None] = mapped_column(String(36), index=True)  # None: this machine's own
    created_by: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(default=now)


@dataclass(frozen=True)
class Content:
    """A file of lines that are known to be samples, each written in the one way."""

    path: Path
    kind: str
    digest: str
    samples: int
    bytes: int


# For jobs, which run in threads without an event loop.


def resolve(data: Data, owner_id: str | None) -> Dataset:
    """The dataset that is meant: found, or made from prompts or documents as they are now."""
    return asyncio.run(apart(lambda database: _resolve(database, data, owner_id)))


def get(dataset_id: str) -> Dataset:
    return asyncio.run(apart(lambda database: _get(database, dataset_id)))


def keep_for(owner_id: str | None, name: str, content: Content, source: dict[str, Any]) -> Dataset:
    """The dataset of this name with this content, of the owner of a job."""
    return asyncio.run(apart(lambda database: _keep_for(database, owner_id, name, content, source)))


def load(dataset: Dataset) -> list[Sample] | list[Pair]:
    """All its samples, if they are still what they were."""
    with tempfile.TemporaryDirectory(prefix="forgearr-dataset-") as folder:
        content = fetch(dataset, Path(folder)).read_bytes()
    if hashlib.sha256(content).hexdigest() != dataset.digest:
        raise DatasetDamaged(
            f"{dataset.address}, the file of {_title(dataset)}, is not what it was: delete the dataset, make it anew."
        )
    return parse(content, _title(dataset))


def fetch(dataset: Dataset, folder: Path) -> Path:
    """Its file as one of this machine."""
    try:
        return storage.fetch(dataset.address, folder)
    except FileNotFoundError as error:
        raise DatasetDamaged(f"{dataset.address}, the file of {_title(dataset)}, is gone: make it anew.") from error


# For doors.


async def check(session: AsyncSession, data: Data, owner: Owner, method: Literal["supervised", "dpo"]) -> None:
    """Raise what `resolve` and the training would, as far as that can be said without reading the data."""
    kind = "chat"  # whatever is no uploaded dataset
    if data.dataset is not None and data.dataset != SHIPPED:
        kind = (await find(session, data.dataset, owner)).kind
    if data.file is not None:
        kind = (await _training_file(session, data.file, owner)).content or kind
    if data.prompts is not None:
        await prompts.matching(session, data.prompts, owner)
    if data.folder is not None:
        _permitted(data.folder, owner)
    if (kind == "preference") != (method == "dpo"):
        wanted = "pairs (chosen and rejected)" if method == "dpo" else "chat samples"
        raise WrongKindOfData(f"The method '{method}' learns from {wanted}; this data is of the kind '{kind}'.")


def needs_admin(spec: Data | FineTuneSpec) -> bool:
    """Whether it names a folder of this machine that is not for everybody."""
    sources = [spec] if isinstance(spec, Data) else [spec.data, *([spec.validation] if spec.validation else [])]
    named = [data.folder for data in sources if data.folder is not None]
    if isinstance(spec, FineTuneSpec) and is_path(spec.base_model):
        named.append(spec.base_model)
    return not all(is_shared(path) for path in named)


def is_path(reference: str) -> bool:
    """Whether a base model is named by a place on this machine, and not by the name of a model."""
    return reference.startswith(("/", "~", "."))


def is_shared(path: str) -> bool:
    """Whether it lies in a folder that is for everybody, wherever its links lead."""
    place = _place(path)
    return any(place.is_relative_to(root.expanduser().resolve()) for root in get_settings().forge.folders)


def visible_to(owner: Owner) -> Select[Dataset]:
    return select(Dataset) if owner.is_admin else select(Dataset).where(Dataset.owner_id == owner.id)


async def find(session: AsyncSession, reference: str, owner: Owner = LOCAL) -> Dataset:
    """A dataset by its id, or one's own by its name (the newest version) or NAME:v2."""
    by_id = await session.get(Dataset, reference)
    if by_id is not None and (owner.is_admin or by_id.owner_id == owner.id):
        return by_id
    version = VERSION.search(reference)
    query = select(Dataset).where(Dataset.name == VERSION.sub("", reference), Dataset.owner_id == owner.id)
    if version:
        query = query.where(Dataset.version == int(version[1]))
    found = await session.scalar(query.order_by(Dataset.version.desc()).limit(1))
    if found is None:
        raise DatasetNotFound(f"There is no dataset '{reference}'.")
    return found


def write(samples: Iterable[Sample | Pair], path: Path, source: str) -> Content:
    """Write samples, one by one, into a file that can become a dataset."""
    digest, count, kind = hashlib.sha256(), 0, ""
    with path.open("wb") as file:
        for sample in samples:
            line = line_of(sample)
            digest.update(line)
            file.write(line)
            count += 1
            kind = "chat" if isinstance(sample, Sample) else "preference"
    if not count:
        raise EmptyData(f"There is no sample in {source}.")
    return Content(path, kind, digest.hexdigest(), count, path.stat().st_size)


async def keep(
    database: Database, name: str, content: Content, source: dict[str, Any], owner: Owner = LOCAL
) -> Dataset:
    """The dataset of this name with this content: the one there is, or the next version."""
    stored = f"datasets/{content.digest}.jsonl"
    while True:
        if not await asyncio.to_thread(storage.exists, storage.address(stored)):
            await asyncio.to_thread(storage.save, content.path, stored)
        async with database.transaction() as session:
            await one_at_a_time(session, "datasets")
            # Nobody removes it while this is open; but a moment ago somebody may have.
            if await asyncio.to_thread(storage.exists, storage.address(stored)):
                return await _keep_row(session, name, content, storage.address(stored), source, owner)


async def delete(database: Database, dataset_id: str, owner: Owner = LOCAL) -> None:
    """Delete a dataset, and its file when no other dataset has the same content."""
    async with database.transaction() as session:
        dataset = await session.get(Dataset, dataset_id)
        if dataset is None or not (owner.is_admin or dataset.owner_id == owner.id):
            raise DatasetNotFound(f"There is no dataset '{dataset_id}'.")
        if job_id := await _learner(session, dataset):
            raise DatasetInUse(f"{job_id} learns from {_title(dataset)}: wait for it, or cancel it.")
        await session.delete(dataset)
    async with database.transaction() as session:
        await one_at_a_time(session, "datasets")
        if await session.scalar(select(Dataset.id).where(Dataset.digest == dataset.digest).limit(1)) is None:
            await asyncio.to_thread(storage.remove, dataset.address)


async def _get(database: Database, dataset_id: str) -> Dataset:
    async with database.reading() as session:
        return await find(session, dataset_id)


async def _keep_for(
    database: Database, owner_id: str | None, name: str, content: Content, source: dict[str, Any]
) -> Dataset:
    async with database.reading() as session:
        owner = await _owner(session, owner_id)
    return await keep(database, name, content, source, owner)


async def _resolve(database: Database, data: Data, owner_id: str | None) -> Dataset:
    async with database.reading() as session:
        owner = await _owner(session, owner_id)
        if data.dataset is not None and data.dataset != SHIPPED:
            return await find(session, data.dataset, owner)
        file = await _training_file(session, data.file, owner) if data.file is not None else None
        chosen = await prompts.samples(session, data.prompts, owner) if data.prompts is not None else []
    if file is not None:
        with files.opened(file) as content:
            samples = read(lines_of(content), file.filename)
            return await _make(database, f"file/{_slug(file.filename)}", samples, {"file": file.id}, owner)
    if data.prompts is not None:
        source = {"prompts": data.prompts.model_dump(exclude_none=True)}
        return await _make(database, _prompts_name(data), chosen, source, owner)
    if data.folder is not None:
        folder = _permitted(data.folder, owner)
        reading = documents.read_folder(folder)
        if reading.skipped:
            named = ", ".join(reading.skipped[:20])
            logger.warning("%s: %d files are no text in UTF-8: %s", folder, len(reading.skipped), named)
        source = {"folder": documents.shown(folder), "files": reading.files, "skipped": len(reading.skipped)}
        return await _make(database, f"folder/{_slug(folder.name)}", reading.samples, source, owner)
    return await _make(database, SHIPPED, shipped(), {"shipped": SHIPPED}, owner)


def shipped() -> list[Sample] | list[Pair]:
    """The samples that come with Forgearr."""
    return parse((shipped_files("configs") / f"{SHIPPED}.jsonl").read_bytes(), SHIPPED)


async def _make(
    database: Database, name: str, samples: Iterable[Sample | Pair], source: dict[str, Any], owner: Owner
) -> Dataset:
    with tempfile.TemporaryDirectory(prefix="forgearr-dataset-") as folder:
        content = write(samples, Path(folder) / "samples.jsonl", name)
        return await keep(database, name, content, source, owner)


async def _training_file(session: AsyncSession, file_id: str, owner: Owner) -> File:
    file = await files.find(session, file_id, owner)
    if file.purpose != "fine-tune":
        raise NotToLearnFrom(f"The file '{file_id}' was uploaded with the purpose '{file.purpose}', not 'fine-tune'.")
    if file.fault:
        raise NotToLearnFrom(f"The file '{file_id}' cannot be learned from: {file.fault}")
    return file


async def _keep_row(
    session: AsyncSession, name: str, content: Content, address: str, source: dict[str, Any], owner: Owner
) -> Dataset:
    own = (Dataset.name == name, Dataset.owner_id == owner.id)
    known = await session.scalar(select(Dataset).where(*own, Dataset.digest == content.digest))
    if known is not None:
        return known
    newest = await session.scalar(select(func.max(Dataset.version)).where(*own)) or 0
    dataset = Dataset(
        id=f"ds_{uuid4().hex}",
        name=name,
        version=newest + 1,
        kind=content.kind,
        digest=content.digest,
        samples=content.samples,
        bytes=content.bytes,
        address=address,
        source=source,
        owner_id=owner.id,
        created_by=owner.name,
    )
    session.add(dataset)
    await session.flush()
    return dataset


async def _learner(session: AsyncSession, dataset: Dataset) -> str | None:
    """A job that has not finished and needs this dataset."""
    unfinished = select(Job).where(Job.kind.in_(["fine_tune", "forge"]), Job.state.not_in(FINISHED))
    for job in await session.scalars(unfinished):
        wanted = job.spec.get("data", {}).get("dataset")
        held_out = (job.spec.get("validation") or {}).get("dataset")
        state: dict[str, Any] = job.checkpoint if isinstance(job.checkpoint, dict) else {}
        own = job.owner_id == dataset.owner_id
        named = own and not {wanted, held_out}.isdisjoint({dataset.name, _title(dataset)})
        if named or dataset.id in (wanted, held_out, state.get("dataset"), state.get("validation")):
            return job.id
    return None


async def _owner(session: AsyncSession, owner_id: str | None) -> Owner:
    if owner_id is None:
        return LOCAL
    user = await session.get(User, owner_id)
    if user is None:
        raise Forbidden(f"The account '{owner_id}', in whose name this runs, does not exist.")
    return Owner(id=user.id, name=user.username, is_admin=user.role == "admin")


def _permitted(path: str, owner: Owner) -> Path:
    if not owner.is_admin and not is_shared(path):
        raise FolderForbidden(f"Only an administrator may read {path}: it is not in a folder of forge.folders.")
    folder = _place(path)
    try:
        if not folder.is_dir():
            raise FolderNotFound(f"There is no folder {path} on this machine.")
    except OSError as error:
        raise FolderNotFound(f"The folder {path} cannot be read: {error.strerror}.") from error
    return folder


def _place(path: str) -> Path:
    try:
        return Path(path).expanduser().resolve()
    except (OSError, RuntimeError) as error:  # an unknown ~user, links that lead to themselves
        raise FolderNotFound(f"There is no folder {path} on this machine: {error}.") from error


def _prompts_name(data: Data) -> str:
    assert data.prompts is not None
    said = [data.prompts.category or "", *sorted(data.prompts.tags or ())]
    return f"prompts/{_slug('-'.join(word for word in said if word) or 'chosen')}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-.")[:80] or "unnamed"


def _title(dataset: Dataset) -> str:
    return f"{dataset.name}:v{dataset.version}"
