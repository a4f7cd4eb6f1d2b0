"""The tables of files, and of uploads in parts. Their bytes are in storage."""

from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Index, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from cluster import storage
from cluster.db import Base, now
from cluster.db import Sequence as Counter

MAX_ID_LENGTH = 100
MAX_FILENAME_LENGTH = 500


class File(Base):
    __tablename__ = "files"
    __table_args__ = (Index("ix_files_owner_id_created_at", "owner_id", "created_at"),)

    id: Mapped[str] = mapped_column(String(MAX_ID_LENGTH), primary_key=True)
    purpose: Mapped[str] = mapped_column(String(40))
    filename: Mapped[str] = mapped_column(String(MAX_FILENAME_LENGTH))
    bytes: Mapped[int] = mapped_column(Counter)
    content: Mapped[str | None] = mapped_column(String(20))  # format of its lines; None: not checked
    fault: Mapped[str | None] = mapped_column(Text)  # why it is not valid for its purpose
    owner_id: Mapped[str | None] = mapped_column(String(36))  # None: this machine
    created_by: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(default=now, index=True)
    expires_at: Mapped[datetime | None] = mapped_column(index=True)  # None: never

    @property
    def address(self) -> str:
        return storage.address(storage_name(self.id))


class Upload(Base):
    __tablename__ = "uploads"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    purpose: Mapped[str] = mapped_column(String(40))
    filename: Mapped[str] = mapped_column(String(MAX_FILENAME_LENGTH))
    bytes: Mapped[int] = mapped_column(Counter)  # the announced size of the file
    file_seconds: Mapped[int | None]  # lifetime of the file; None: unlimited
    ended: Mapped[str | None] = mapped_column(String(12))  # completed, cancelled or expired
    file_id: Mapped[str | None] = mapped_column(String(MAX_ID_LENGTH))
    owner_id: Mapped[str | None] = mapped_column(String(36), index=True)  # None: this machine
    created_by: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(default=now)
    expires_at: Mapped[datetime]

    @property
    def status(self) -> Any:
        return self.ended or ("pending" if self.expires_at > now() else "expired")


class UploadPart(Base):
    __tablename__ = "upload_parts"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id"), index=True)
    bytes: Mapped[int] = mapped_column(Counter)
    created_at: Mapped[datetime] = mapped_column(default=now)

    @property
    def name(self) -> str:
        return f"uploads/{self.upload_id}/{self.id}"


def storage_name(file_id: str) -> str:
    return f"files/{file_id}"
