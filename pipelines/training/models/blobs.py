"""Blobs: uploaded model files in storage, addressed by their SHA-256, and their rows in the database.

A blob is in use while a version in the registry has it. To create a version, first `touch` its blobs: they are not
deleted for some time after that (blob_cleanup.py).
"""

import asyncio
import hashlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterable, AsyncIterator, Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import String, Text, delete, update
from sqlalchemy.orm import Mapped, mapped_column

from cluster import storage
from cluster.db import Base, Database, Sequence, advisory_lock, delete_rows, now
from cluster.errors import InvalidRequest, NotFound

CHUNK_BYTES = 4 * 1024 * 1024

OnBytes = Callable[[int], None]
"""Receives the number of bytes that were read so far."""


class Blob(Base):
    __tablename__ = "blobs"

    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    bytes: Mapped[int] = mapped_column(Sequence)
    used_at: Mapped[datetime] = mapped_column(index=True)
    model: Mapped[str | None] = mapped_column(Text)  # registered model that a sweep has seen it in; None: in none yet


class BlobNotFound(NotFound):
    """There is no such blob."""

    code = "BLOB_NOT_FOUND"


class DigestMismatch(InvalidRequest):
    """The content does not have the digest that was announced."""

    code = "DIGEST_MISMATCH"


async def touch(database: Database, sha256: str) -> int:
    """Protect a blob from deletion for some time. Returns its size in bytes."""
    async with database.transaction() as session:
        query = update(Blob).where(Blob.sha256 == sha256).values(used_at=now()).returning(Blob.bytes)
        size = await session.scalar(query)
    if size is None:
        raise BlobNotFound(f"There is no blob sha256:{sha256}: send it first, to /api/blobs/sha256:{sha256}.")
    return size


async def receive(database: Database, sha256: str, content: AsyncIterable[bytes]) -> None:
    """Store a blob from a stream. If the stream breaks off or has another digest, nothing is stored."""
    digest, size = hashlib.sha256(), 0
    file = await asyncio.to_thread(storage.StorageWriter, _storage_name(sha256))
    try:
        async for chunk in _chunks(content):
            await asyncio.to_thread(_write, file, digest, chunk)
            size += len(chunk)
        if digest.hexdigest() != sha256:
            raise DigestMismatch(f"The content has the digest sha256:{digest.hexdigest()}, not sha256:{sha256}.")
        await asyncio.to_thread(file.commit)
    except BaseException:
        await asyncio.to_thread(file.discard)
        raise
    await _save_row(database, sha256, size)


async def add_file(database: Database, path: Path, sha256: str, on_bytes: OnBytes = lambda _: None) -> None:
    """Store a file of this machine as a blob."""

    async def content() -> AsyncIterator[bytes]:
        bytes_read = 0
        with path.open("rb") as file:
            while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
                yield chunk
                bytes_read += len(chunk)
                on_bytes(bytes_read)

    await receive(database, sha256, content())


def local_path(sha256: str, folder: Path) -> Path:
    """The path of a blob on this machine, to be read only: in local storage itself, else a copy in `folder`."""
    try:
        return storage.fetch(storage.address(_storage_name(sha256)), folder)
    except FileNotFoundError as error:
        raise BlobNotFound(f"The blob sha256:{sha256} is no longer in storage.") from error


def copy_to(sha256: str, target: Path) -> str:
    """Copy a blob into a new file on this machine. Returns the SHA-256 of that file."""
    with tempfile.TemporaryDirectory(prefix=f"{target.name}.", dir=target.parent) as folder:
        source = local_path(sha256, Path(folder))
        try:
            os.link(source, target)  # free if both are on one disk
        except OSError:
            shutil.copyfile(source, target)
    return sha256_of(target)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


async def remove_unused(database: Database, sha256: str, before: datetime) -> bool:
    """Delete a blob if it was not touched since `before`. Returns whether it was deleted."""
    async with database.transaction() as session:
        await advisory_lock(session, "blobs")
        if not await delete_rows(session, delete(Blob).where(Blob.sha256 == sha256, Blob.used_at < before)):
            return False
        # Inside the transaction, so that the lock keeps the blob from being uploaded again meanwhile.
        await asyncio.to_thread(storage.remove, storage.address(_storage_name(sha256)))
    return True


async def _chunks(content: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """The same content in chunks that are large enough to be written in another thread."""
    buffer = bytearray()
    async for chunk in content:
        buffer += chunk
        if len(buffer) >= CHUNK_BYTES:
            yield bytes(buffer)
            buffer.clear()
    yield bytes(buffer)


def _write(file: storage.StorageWriter, digest: Any, chunk: bytes) -> None:
    digest.update(chunk)
    file.write(chunk)


async def _save_row(database: Database, sha256: str, size: int) -> None:
    async with database.transaction() as session:
        await advisory_lock(session, "blobs")
        # `remove_unused` takes the same lock. Before that, it may have deleted the file, if the blob had an old row.
        if not await asyncio.to_thread(storage.exists, storage.address(_storage_name(sha256))):
            raise BlobNotFound(f"The blob sha256:{sha256} was deleted during its upload: send it again.")
        await session.merge(Blob(sha256=sha256, bytes=size, used_at=now()))


def _storage_name(sha256: str) -> str:
    return f"blobs/{sha256}"
