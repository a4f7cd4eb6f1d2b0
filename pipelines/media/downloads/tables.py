"""The tables of followed services, with the cursors of their polls, and of the downloads that were seen there."""

from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import (
    BigInteger,
    Boolean,
    ForeignKey,
    Index,
    Integer,
    String,
    Text,
    UniqueConstraint,
    delete,
    or_,
    select,
    text,
)
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from cluster.db import Base, Database, delete_rows, now
from cluster.services.capabilities.download_tracking import MAX_ID_LENGTH, ActiveState, Outcome
from cluster.settings import get_settings

DownloadState = ActiveState | Outcome | Literal["retried"]


class FollowedService(Base):
    """The cursor of a service's polls, and what they have counted."""

    __tablename__ = "followed_services"

    service_id: Mapped[int] = mapped_column(ForeignKey("services.id", ondelete="CASCADE"), primary_key=True)
    connected_as_of: Mapped[datetime]  # of the service at the last poll: the cursor is invalid for another address
    looks: Mapped[int] = mapped_column(Integer, default=0)  # the number of polls
    looked_at: Mapped[datetime | None]  # the last poll
    cursor: Mapped[dict[str, Any]] = mapped_column(default=dict)
    error: Mapped[str | None] = mapped_column(Text)  # why the last poll failed
    completed: Mapped[int] = mapped_column(Integer, default=0)  # number of downloads since the first poll
    failed: Mapped[int] = mapped_column(Integer, default=0)
    imported: Mapped[int] = mapped_column(Integer, default=0)
    underway: Mapped[int] = mapped_column(Integer, default=0)  # number of active downloads at the last poll
    bytes_left: Mapped[int] = mapped_column(BigInteger, default=0)
    leftovers_at: Mapped[datetime | None]  # the last search for leftover folders


class FollowedDownload(Base):
    """A download as one service sees it."""

    __tablename__ = "followed_downloads"
    __table_args__ = (
        UniqueConstraint("service_id", "item"),
        Index(
            "ix_followed_downloads_striking",
            "service_id",
            sqlite_where=text("strikes > 0"),
            postgresql_where=text("strikes > 0"),
        ),
    )

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    service_id: Mapped[int] = mapped_column(ForeignKey("services.id", ondelete="CASCADE"))
    item: Mapped[str] = mapped_column(String(MAX_ID_LENGTH))  # the service's id
    download_id: Mapped[str | None] = mapped_column(String(MAX_ID_LENGTH), index=True)  # the download client's id
    title: Mapped[str] = mapped_column(Text)
    state: Mapped[DownloadState] = mapped_column(String(20))
    reason: Mapped[str] = mapped_column(Text, default="")
    tags: Mapped[list[str]] = mapped_column(default=list)
    content: Mapped[list[str]] = mapped_column(default=list)
    bytes_left: Mapped[int | None] = mapped_column(BigInteger)
    strikes: Mapped[int] = mapped_column(Integer, default=0)  # polls in a row without progress
    moved_at: Mapped[datetime]  # its last progress, or when it failed
    ended_at: Mapped[datetime | None] = mapped_column(index=True)
    told: Mapped[bool] = mapped_column(Boolean, default=False)  # its failure or import was announced
    settled: Mapped[bool] = mapped_column(Boolean, default=False)  # nothing remains to be decided about it
    decide_at: Mapped[datetime | None]  # no decision before then


async def tags_of(session: AsyncSession, item: str) -> set[str]:
    """The tags of a download in all services that have it."""
    same = or_(FollowedDownload.item == item, FollowedDownload.download_id == item)
    return {tag for tags in await session.scalars(select(FollowedDownload.tags).where(same)) for tag in tags}


async def remove_old(database: Database) -> int:
    """Delete downloads that ended more than `media.history_days` ago."""
    async with database.transaction() as session:
        oldest = now() - timedelta(days=get_settings().media.history_days)
        return await delete_rows(session, delete(FollowedDownload).where(FollowedDownload.ended_at < oldest))
