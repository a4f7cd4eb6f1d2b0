"""Uploads in parts: a client sends the parts of a file, and completes the upload to a file.

A part may be sent again, under a new id. The client names the valid parts when it completes the upload.
"""

import asyncio
import hashlib
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import BinaryIO, Literal
from uuid import uuid4

from sqlalchemy import Select, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster import storage
from cluster.db import Database, now
from cluster.errors import Conflict, InvalidRequest, NotFound
from cluster.files import store as file_store
from cluster.files.tables import File, Upload, UploadPart
from cluster.identity import account_limits
from cluster.ownership import Principal, require

UPLOAD_LIFETIME = timedelta(hours=1)
CHUNK_BYTES = 1024 * 1024
MAX_SIZE_FACTOR = 2
"""The parts of an upload may have this many times its bytes, so that some can be sent again."""

Status = Literal["pending", "completed", "cancelled", "expired"]
ContentCheck = tuple[str | None, str | None]
"""The format of a file's lines, and why they are not valid."""


class UploadNotFound(NotFound):
    """There is no such upload."""

    code = "UPLOAD_NOT_FOUND"


class UploadEnded(Conflict):
    """This upload has ended."""

    code = "UPLOAD_ENDED"


class InvalidParts(InvalidRequest):
    """The parts do not match the upload."""

    code = "INVALID_UPLOAD_PARTS"


async def begin(
    session: AsyncSession,
    *,
    filename: str,
    purpose: str,
    size: int,
    file_seconds: int | None,
    principal: Principal,
) -> Upload:
    """Begin an upload, if the account has room for the file."""
    await account_limits.require_room(session, principal, "files_mb", size)
    moment = now()
    upload = Upload(
        id=f"upload_{uuid4().hex}",
        purpose=purpose,
        filename=filename,
        bytes=size,
        file_seconds=file_seconds,
        owner_id=principal.id,
        created_by=principal.name,
        created_at=moment,
        expires_at=moment + UPLOAD_LIFETIME,
    )
    session.add(upload)
    return upload


async def find(session: AsyncSession, upload_id: str, principal: Principal, *, lock: bool = False) -> Upload:
    query: Select[Upload] = select(Upload).where(Upload.id == upload_id)
    upload = await session.scalar(query.with_for_update() if lock else query)
    return require(upload, principal, UploadNotFound(f"There is no upload '{upload_id}'."))


async def find_pending(session: AsyncSession, upload_id: str, principal: Principal, *, lock: bool = False) -> Upload:
    upload = await find(session, upload_id, principal, lock=lock)
    if upload.status != "pending":
        raise UploadEnded(f"The upload '{upload_id}' is {upload.status} and cannot be changed.")
    return upload


async def add_part(database: Database, upload_id: str, source: BinaryIO, size: int, principal: Principal) -> UploadPart:
    part = UploadPart(id=f"part_{uuid4().hex}", upload_id=upload_id, bytes=size, created_at=now())
    address = await asyncio.to_thread(storage.write, source, part.name)
    try:
        async with database.transaction() as session:
            upload = await find_pending(session, upload_id, principal, lock=True)
            stored_bytes = select(func.sum(UploadPart.bytes)).where(UploadPart.upload_id == upload_id)
            if (await session.scalar(stored_bytes) or 0) + size > MAX_SIZE_FACTOR * upload.bytes:
                raise InvalidParts(
                    f"The parts would have more than {MAX_SIZE_FACTOR} times the {upload.bytes} bytes of the upload."
                )
            session.add(part)
    except Exception:
        await asyncio.to_thread(storage.remove, address)
        raise
    return part


async def complete(
    database: Database,
    upload_id: str,
    part_ids: Sequence[str],
    md5: str | None,
    check_content: Callable[[str, BinaryIO, str], ContentCheck],
    principal: Principal,
) -> tuple[Upload, File]:
    """Join these parts, in this order, to a file. `check_content` gets its purpose, content and name."""
    async with database.read_transaction() as session:
        upload = await find_pending(session, upload_id, principal)
        uploaded = await session.scalars(select(UploadPart).where(UploadPart.upload_id == upload_id))
        parts = _select_parts({part.id: part for part in uploaded}, part_ids, upload)
    lifetime = timedelta(seconds=upload.file_seconds) if upload.file_seconds else None
    file_owner = Principal(id=upload.owner_id, name=upload.created_by)
    with tempfile.TemporaryFile(prefix="forgearr-upload-") as combined:
        digest = await asyncio.to_thread(_concatenate, parts, combined)
        if md5 is not None and digest != md5.lower():
            raise InvalidParts(f"The parts have the MD5 checksum {digest}, not {md5}.")
        combined.seek(0)
        content, fault = await asyncio.to_thread(check_content, upload.purpose, combined, upload.filename)
        combined.seek(0)
        file = await file_store.store_bytes(
            combined, file_store.new_id(), upload.filename, upload.purpose, file_owner, lifetime
        )
    file.content, file.fault = content, fault
    try:
        async with database.transaction() as session:
            upload = await find_pending(session, upload_id, principal, lock=True)
            upload.ended, upload.file_id = "completed", file.id
            session.add(file)
    except Exception:
        await file_store.discard_bytes(file.id)
        raise
    await _delete_parts(database, upload)
    return upload, file


async def cancel(database: Database, upload_id: str, principal: Principal) -> Upload:
    async with database.transaction() as session:
        upload = await find_pending(session, upload_id, principal, lock=True)
        upload.ended = "cancelled"
    await _delete_parts(database, upload)
    return upload


async def remove_expired(database: Database) -> int:
    """End the expired uploads, and delete the parts of all ended ones. Returns how many have expired."""
    async with database.transaction() as session:
        expired_query = select(Upload).where(Upload.ended.is_(None), Upload.expires_at <= now()).with_for_update()
        expired = list(await session.scalars(expired_query))
        for upload in expired:
            upload.ended = "expired"
    async with database.read_transaction() as session:
        with_parts = select(UploadPart.upload_id)
        finished = list(
            await session.scalars(select(Upload).where(Upload.ended.is_not(None), Upload.id.in_(with_parts)))
        )
    for upload in finished:
        await _delete_parts(database, upload)
    return len(expired)


def _select_parts(uploaded: dict[str, UploadPart], part_ids: Sequence[str], upload: Upload) -> list[UploadPart]:
    if len(set(part_ids)) != len(part_ids):
        raise InvalidParts("A part is listed twice.")
    for part_id in part_ids:
        if part_id not in uploaded:
            raise InvalidParts(f"The upload '{upload.id}' has no part '{part_id}'.")
    size = sum(uploaded[part_id].bytes for part_id in part_ids)
    if size != upload.bytes:
        raise InvalidParts(f"The parts have {size} bytes in total, but the upload was announced with {upload.bytes}.")
    return [uploaded[part_id] for part_id in part_ids]


def _concatenate(parts: Sequence[UploadPart], target: BinaryIO) -> str:
    """Write the parts to `target` in order, and return the MD5 checksum of the whole."""
    digest = hashlib.md5(usedforsecurity=False)
    for part in parts:
        try:
            source = storage.open_file(storage.address(part.name))
        except FileNotFoundError as error:
            raise UploadEnded(f"The parts of the upload '{part.upload_id}' have been deleted.") from error
        with source:
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                target.write(chunk)
    return digest.hexdigest()


async def _delete_parts(database: Database, upload: Upload) -> None:
    """Delete the bytes first: without the rows, they could not be found again."""
    await asyncio.to_thread(storage.remove, storage.address(f"uploads/{upload.id}"))
    async with database.transaction() as session:
        for part in await session.scalars(select(UploadPart).where(UploadPart.upload_id == upload.id)):
            await session.delete(part)
