"""Datasets: find, store, fetch and delete the files of samples that trainings read.

A dataset never changes. It is identified by the hash of its lines: the same content under the same name of the same
owner is the same dataset, and new content under that name is its next version. A dataset that was made from prompts or
documents does not change when they do.
"""

import asyncio
import hashlib
import logging
import re
import tempfile
from collections.abc import Collection
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from sqlalchemy import Index, String, Text, func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from cluster import audit_log, identity, storage
from cluster.db import Base, Database, advisory_lock, now, run_with_database
from cluster.db import Sequence as Counter
from cluster.errors import Conflict, ForgearrError, NotFound
from cluster.files.disk import has_filled
from cluster.identity import account_limits
from cluster.ownership import LOCAL, Principal, can_access, require
from jobs.states import FINISHED
from jobs.tables import Job
from pipelines.training.data.content import SampleFile
from pipelines.training.data.parsing import parse_samples
from pipelines.training.data.samples import PreferencePair, Sample

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,99}$"
"""Of uploaded datasets. The names of generated datasets contain a slash."""
MAX_NAME_LENGTH = 100
VERSION_SUFFIX = re.compile(r":v([1-9][0-9]{0,8})\Z")

logger = logging.getLogger(__name__)


class DatasetNotFound(NotFound):
    """There is no such dataset."""

    code = "DATASET_NOT_FOUND"


class DatasetInUse(Conflict):
    """A job uses this dataset."""

    code = "DATASET_IN_USE"


class DatasetDamaged(ForgearrError):
    """The file of a dataset is missing or has changed."""

    code = "DATASET_DAMAGED"


class Dataset(Base):
    __tablename__ = "datasets"
    __table_args__ = (Index("ix_datasets_name_version", "name", "version"),)

    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    name: Mapped[str] = mapped_column(String(MAX_NAME_LENGTH))
    version: Mapped[int]  # counts up within the owner and the name
    kind: Mapped[str] = mapped_column(String(12))  # chat or preference
    digest: Mapped[str] = mapped_column(String(64), index=True)  # SHA-256 of its lines
    samples: Mapped[int]
    bytes: Mapped[int] = mapped_column(Counter)
    address: Mapped[str] = mapped_column(Text)  # in storage; datasets with the same content share it
    source: Mapped[dict[str, Any]]  # what it was made from when it was created
    owner_id: Mapped[str | None] = mapped_column(String(36), index=True)  # None: the local owner
    created_by: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(default=now)


def get(dataset_id: str) -> Dataset:
    return run_with_database(lambda database: _get(database, dataset_id))


def store_for_owner(owner_id: str | None, name: str, content: SampleFile, source: dict[str, Any]) -> Dataset:
    """`store_dataset` for jobs, which run in threads without an event loop."""
    return run_with_database(lambda database: _store_for_owner(database, owner_id, name, content, source))


def load(dataset: Dataset) -> list[Sample] | list[PreferencePair]:
    """All samples of a dataset. Raises DatasetDamaged if its file has changed."""
    with tempfile.TemporaryDirectory(prefix="forgearr-dataset-") as folder:
        content = fetch(dataset, Path(folder)).read_bytes()
    if hashlib.sha256(content).hexdigest() != dataset.digest:
        raise DatasetDamaged(
            f"{dataset.address}, the file of {_versioned_name(dataset)}, has changed: delete and recreate the dataset."
        )
    return parse_samples(content, _versioned_name(dataset))


def fetch(dataset: Dataset, folder: Path) -> Path:
    """A path on this machine to the file of a dataset."""
    try:
        return storage.fetch(dataset.address, folder)
    except FileNotFoundError as error:
        raise DatasetDamaged(
            f"{dataset.address}, the file of {_versioned_name(dataset)}, is missing: delete and recreate the dataset."
        ) from error


async def find(session: AsyncSession, reference: str, principal: Principal) -> Dataset:
    """A dataset by its id, or one of the owner's by its name (the newest version) or by NAME:v2."""
    by_id = await session.get(Dataset, reference)
    if by_id is not None and can_access(by_id, principal):
        return by_id
    version = VERSION_SUFFIX.search(reference)
    query = select(Dataset).where(Dataset.name == VERSION_SUFFIX.sub("", reference), Dataset.owner_id == principal.id)
    if version:
        query = query.where(Dataset.version == int(version[1]))
    found = await session.scalar(query.order_by(Dataset.version.desc()).limit(1))
    if found is None:
        raise DatasetNotFound(f"There is no dataset '{reference}'.")
    return found


async def store_dataset(
    database: Database, name: str, content: SampleFile, source: dict[str, Any], principal: Principal
) -> Dataset:
    """Return the dataset with this name and content: the existing one, or a new version."""
    storage_name = f"datasets/{content.digest}.jsonl"
    while True:
        address = storage.address(storage_name)
        if not await asyncio.to_thread(storage.exists, address):
            await asyncio.to_thread(storage.save, content.path, storage_name)
        try:
            async with database.transaction() as session:
                await advisory_lock(session, "datasets")
                # A deletion takes the same lock, so the file stays from here on. It may be gone since it was saved.
                if await asyncio.to_thread(storage.exists, address):
                    return await _find_or_add(session, name, content, address, source, principal)
        except account_limits.AccountLimitReached:
            await _remove_unused(database, content.digest, address)
            raise
        except SQLAlchemyError as error:
            if has_filled(error):
                await _remove_unused(database, content.digest, address)
            raise


@account_limits.measures("datasets_mb", "MB of datasets", "Delete some datasets.", unit=account_limits.MB)
async def count_bytes(session: AsyncSession, account_ids: Collection[str]) -> dict[str, int]:
    """The bytes of the datasets of each account. Equal content of several datasets counts for each."""
    query = select(Dataset.owner_id, func.sum(Dataset.bytes)).where(Dataset.owner_id.in_(account_ids))
    rows = await session.execute(query.group_by(Dataset.owner_id))
    return {owner_id: int(total) for owner_id, total in rows if owner_id is not None}


async def delete(database: Database, dataset_id: str, principal: Principal) -> None:
    """Delete a dataset, and its file when no other dataset has the same content."""
    async with database.transaction() as session:
        missing = DatasetNotFound(f"There is no dataset '{dataset_id}'.")
        dataset = require(await session.get(Dataset, dataset_id), principal, missing)
        if job_id := await _job_using(session, dataset):
            raise DatasetInUse(f"The job {job_id} uses {_versioned_name(dataset)}: wait for it, or cancel it.")
        await session.delete(dataset)
        audit_log.record(session, "dataset.delete", principal, _versioned_name(dataset), id=dataset.id)
    await _remove_unused(database, dataset.digest, dataset.address)


async def _get(database: Database, dataset_id: str) -> Dataset:
    async with database.read_transaction() as session:
        return await find(session, dataset_id, LOCAL)


async def _store_for_owner(
    database: Database, owner_id: str | None, name: str, content: SampleFile, source: dict[str, Any]
) -> Dataset:
    async with database.read_transaction() as session:
        principal = await identity.find_principal(session, owner_id)
    return await store_dataset(database, name, content, source, principal)


async def _find_or_add(
    session: AsyncSession, name: str, content: SampleFile, address: str, source: dict[str, Any], principal: Principal
) -> Dataset:
    same_name = (Dataset.name == name, Dataset.owner_id == principal.id)
    existing = await session.scalar(select(Dataset).where(*same_name, Dataset.digest == content.digest))
    if existing is not None:
        return existing
    await account_limits.require_room(session, principal, "datasets_mb", content.bytes)
    newest = await session.scalar(select(func.max(Dataset.version)).where(*same_name)) or 0
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
        owner_id=principal.id,
        created_by=principal.name,
    )
    session.add(dataset)
    await session.flush()
    return dataset


async def _remove_unused(database: Database, digest: str, address: str) -> None:
    """Delete the file of datasets unless one has it."""
    async with database.transaction() as session:
        await advisory_lock(session, "datasets")
        if await session.scalar(select(Dataset.id).where(Dataset.digest == digest).limit(1)) is None:
            await asyncio.to_thread(storage.remove, address)


async def _job_using(session: AsyncSession, dataset: Dataset) -> str | None:
    """A job that has not finished and needs this dataset."""
    unfinished = select(Job).where(Job.kind.in_(["fine_tune", "forge"]), Job.state.not_in(FINISHED))
    for job in await session.scalars(unfinished):
        dataset_name = job.spec.get("data", {}).get("dataset")
        held_out = (job.spec.get("validation") or {}).get("dataset")
        state: dict[str, Any] = job.checkpoint if isinstance(job.checkpoint, dict) else {}
        is_same_owner = job.owner_id == dataset.owner_id
        is_named = is_same_owner and not {dataset_name, held_out}.isdisjoint({dataset.name, _versioned_name(dataset)})
        if is_named or dataset.id in (dataset_name, held_out, state.get("dataset"), state.get("validation")):
            return job.id
    return None


def _versioned_name(dataset: Dataset) -> str:
    return f"{dataset.name}:v{dataset.version}"
