"""What a backup says of itself: the header, which anybody can read, and the list of its files."""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict

FORMAT = 1
"""Grows when an older version of Forgearr could not restore a newer backup."""

Engine = Literal["SQLite", "PostgreSQL"]
MlflowPart = Literal["included", "elsewhere", "none"]
Replacements = list[tuple[str, str]]
"""Old and new beginnings of addresses, in the order in which they are replaced."""


class Header(BaseModel):
    """The first part of a backup. It is not encrypted."""

    model_config = ConfigDict(frozen=True)

    format: int = FORMAT
    version: str
    """Of Forgearr."""
    revision: str
    """Of the database's schema."""
    engine: Engine
    created_at: datetime
    is_encrypted: bool
    has_secrets: bool
    mlflow: MlflowPart
    content_bytes: int
    """The size of all files together."""


class FileEntry(BaseModel):
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """The last part of the content."""

    home: str
    """Where the installation was. Rows have addresses of files below it."""
    storage: str
    files: dict[str, FileEntry]
