"""What is known of downloads: how far each service has been followed, and each download that is seen there."""

from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import BigInteger, Boolean, ForeignKey, Integer, String, Text, UniqueConstraint, delete, or_, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from cluster.db import Base, Database, delete_rows, now
from cluster.services.capabilities.download_tracking import MAX_ID_LENGTH, ActiveState, Outcome
from cluster.settings import get_settings

DownloadState = ActiveState | Outcome | Literal["retried"]


class FollowedService(Base):
    """How far a service has been followed, and what was counted on the way."""

    __tablename__ = "followed_services"

    service_id: Mapped[int] = mapped_column(ForeignKey("services.id", ondelete="CASCADE"), primary_key=True)
    connected_as_of: Mapped[datetime]  # of the service, when it was looked at: another address begins anew
    looks: Mapped[int] = mapped_column(Integer, default=0)
    looked_at: Mapped[datetime | None]
    cursor: Mapped[dict[str, Any]] = mapped_column(default=dict)
    error: Mapped[str | None] = mapped_column(Text)  # why the last look saw nothing
    completed: Mapped[int] = mapped_column(Integer, default=0)  # downloads, ever
    failed: Mapped[int] = mapped_column(Integer, default=0)
    imported: Mapped[int] = mapped_column(Integer, default=0)
    underway: Mapped[int] = mapped_column(Integer, default=0)  # at the last look
    bytes_left: Mapped[int] = mapped_column(BigInteger, default=0)
    leftovers_at: Mapped[datetime | None]  # when leftover folders were last looked for


class FollowedDownload(Base):
    """A download as one service sees it."""

    __tablename__ = "followed_downloads"
    __table_args__ = (UniqueConstraint("service_id", "item"),)

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    service_id: Mapped[int] = mapped_column(ForeignKey("services.id", ondelete="CASCADE"))
    item: Mapped[str] = mapped_column(String(MAX_ID_LENGTH))  # what the service calls it
    download_id: Mapped[str | None] = mapped_column(
        String(MAX_ID_LENGTH), index=True
    )  # what the download client calls it
    title: Mapped[str] = mapped_column(Text)
    state: Mapped[DownloadState] = mapped_column(String(20))
    reason: Mapped[str] = mapped_column(Text, default="")
    tags: Mapped[list[str]] = mapped_column(default=list)
    content: Mapped[list[str]] = mapped_column(default=list)
    bytes_left: Mapped[int | None] = mapped_column(BigInteger)
    strikes: Mapped[int] = mapped_column(Integer, default=0)  # looks in a row without progress
    moved_at: Mapped[datetime]  # when it got on for the last time, or failed
    ended_at: Mapped[datetime | None] = mapped_column(index=True)
    told: Mapped[bool] = mapped_column(Boolean, default=False)  # that it has failed, or was imported
    settled: Mapped[bool] = mapped_column(Boolean, default=False)  # there is nothing more to decide about it
    decide_at: Mapped[datetime | None]  # not before then


async def tags_of(session: AsyncSession, item: str) -> set[str]:
    """The tags of a download, as all who follow it have them."""
    same = or_(FollowedDownload.item == item, FollowedDownload.download_id == item)
    return {tag for tags in await session.scalars(select(FollowedDownload.tags).where(same)) for tag in tags}


async def remove_old(database: Database) -> int:
    """Forget downloads that ended long ago."""
    async with database.transaction() as session:
        oldest = now() - timedelta(days=get_settings().media.history_days)
        return await delete_rows(session, delete(FollowedDownload).where(FollowedDownload.ended_at < oldest))
