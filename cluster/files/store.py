"""Files that users upload and that jobs write for them: a row with the owner, and the bytes in storage.

A file never changes. Once it has expired nobody can see it, and `remove_expired` deletes its bytes and its row.
"""

import asyncio
from collections.abc import Collection, Sequence
from datetime import timedelta
from typing import BinaryIO
from uuid import uuid4

from sqlalchemy import Select, func, or_, select, union_all, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from cluster import audit_log, storage
from cluster.db import Database, now
from cluster.errors import NotFound
from cluster.files.disk import has_filled
from cluster.files.tables import File, Upload, storage_name
from cluster.identity import account_limits
from cluster.ownership import Principal, visible

SWEEP_PAGE = 500


class FileNotFound(NotFound):
    """There is no such file."""

    code = "FILE_NOT_FOUND"


async def create_file(
    database: Database,
    source: BinaryIO,
    *,
    filename: str,
    purpose: str,
    principal: Principal,
    content: str | None = None,
    fault: str | None = None,
    lifetime: timedelta | None = None,
    file_id: str | None = None,
) -> File:
    """Store the rest of a binary stream as a file, if its owner's account has room for it.

    A job passes a fixed `file_id` (`file-…`). When it runs again, it gets the file that exists already. What it has
    made is stored in any case.
    """
    is_output = file_id is not None
    file_id = file_id or new_id()
    async with database.read_transaction() as session:
        existing = await session.get(File, file_id)
    if existing is not None:
        return existing
    file = await store_bytes(source, file_id, filename, purpose, principal, lifetime)
    file.content, file.fault = content, fault
    try:
        async with database.transaction() as session:
            if not is_output:
                await account_limits.require_room(session, principal, "files_mb", file.bytes)
            session.add(file)
    except account_limits.AccountLimitReached:
        await discard_bytes(file_id)
        raise
    except SQLAlchemyError as error:
        if has_filled(error):  # after any other error, the row may be there
            await discard_bytes(file_id)
        raise
    return file


async def store_bytes(
    source: BinaryIO, file_id: str, filename: str, purpose: str, principal: Principal, lifetime: timedelta | None
) -> File:
    """Write the bytes to storage, and return the row for them. The caller adds the row in its own transaction."""
    address = await asyncio.to_thread(storage.write, source, storage_name(file_id))
    size = await asyncio.to_thread(storage.size, address)
    return File(
        id=file_id,
        purpose=purpose,
        filename=filename,
        bytes=size,
        owner_id=principal.id,
        created_by=principal.name,
        created_at=now(),
        expires_at=now() + lifetime if lifetime else None,
    )


@account_limits.measures("files_mb", "MB of files and uploads", "Delete some files.", unit=account_limits.MB)
async def count_bytes(session: AsyncSession, account_ids: Collection[str]) -> dict[str, int]:
    """The bytes of each account's files, and those that its pending uploads were announced with."""
    files = select(File.owner_id, File.bytes).where(or_(File.expires_at.is_(None), File.expires_at > now()))
    uploads = select(Upload.owner_id, Upload.bytes).where(Upload.ended.is_(None), Upload.expires_at > now())
    counted = union_all(files.where(File.owner_id.in_(account_ids)), uploads.where(Upload.owner_id.in_(account_ids)))
    parts = counted.subquery()
    rows = await session.execute(select(parts.c.owner_id, func.sum(parts.c.bytes)).group_by(parts.c.owner_id))
    return {owner_id: int(total) for owner_id, total in rows}


async def find(session: AsyncSession, file_id: str, principal: Principal) -> File:
    file = await session.scalar(visible_to(principal).where(File.id == file_id))
    if file is None:
        raise FileNotFound(f"There is no file '{file_id}'.")
    return file


def visible_to(principal: Principal) -> Select[File]:
    """Select the files that this principal may see and that have not expired."""
    unexpired = select(File).where(or_(File.expires_at.is_(None), File.expires_at > now()))
    return visible(unexpired, File, principal)


def open_file(file: File) -> BinaryIO:
    """Open a file, to read it in chunks or line by line. It blocks, so it must not be called in an event loop."""
    try:
        return storage.open_file(file.address)
    except FileNotFoundError as error:
        raise FileNotFound(f"The bytes of the file '{file.id}' are no longer in storage.") from error


async def delete(database: Database, file_id: str, principal: Principal) -> None:
    async with database.transaction() as session:
        file = await find(session, file_id, principal)
        audit_log.record(session, "file.delete", principal, file.id, filename=file.filename)
        file.expires_at = now()  # nobody can see it from now on; after a crash, the sweep deletes the rest
    await _remove(database, [file])


async def expire(session: AsyncSession, file_ids: Sequence[str]) -> None:
    """Let files expire now: nobody sees them any more, and the next sweep deletes them."""
    await session.execute(update(File).where(File.id.in_(file_ids)).values(expires_at=now()))


async def remove_expired(database: Database) -> int:
    """Delete the expired files, and return their number."""
    removed = 0
    while True:
        async with database.read_transaction() as session:
            expired = select(File).where(File.expires_at <= now()).limit(SWEEP_PAGE)
            page = list(await session.scalars(expired))
        if not page:
            return removed
        await _remove(database, page)
        removed += len(page)


def new_id() -> str:
    return f"file-{uuid4().hex}"


async def discard_bytes(file_id: str) -> None:
    """Delete the bytes of a file whose row could not be added."""
    await asyncio.to_thread(storage.remove, storage.address(storage_name(file_id)))


async def _remove(database: Database, files: Sequence[File]) -> None:
    """Delete the bytes first: without the row, they could not be found again."""
    for file in files:
        await asyncio.to_thread(storage.remove, file.address)
    async with database.transaction() as session:
        for file in files:
            if (row := await session.get(File, file.id)) is not None:
                await session.delete(row)
