"""The capability to track the downloads of a service, and to recover failed ones.

A connector that has it declares a `DownloadTracker`. A download client can retry a download (`retry`); a service that
selected its release can replace it (`ReplacementActions`). `pipelines/media/` uses services in no other way.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from cluster.services.http.client import Client

ActiveState = Literal[
    "waiting",  # for its turn, for the network, or because the queue is paused
    "running",  # bytes should arrive
    "processing",  # it is being unpacked, checked or imported
    "blocked",  # it is complete, but cannot be imported
    "failed",
]
Outcome = Literal["completed", "failed", "imported"]
MAX_ID_LENGTH = 300
"""Maximum length of a download's id in the database."""
MAX_TEXT_LENGTH = 500


@dataclass(frozen=True)
class ActiveDownload:
    """A download that has not ended."""

    id: str  # in this service
    title: str
    state: ActiveState
    download_id: str | None  # in the download client
    bytes_left: int | None = None
    reason: str = ""  # messages of the service about it
    content: tuple[str, ...] = ()  # what it contains, such as episode:12
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class FinishedDownload:
    """A download that has ended, or that was imported into a library."""

    id: str  # the same as while it was active
    title: str
    outcome: Outcome
    at: datetime
    download_id: str | None
    reason: str = ""
    content: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    content_id: str | None = None  # of the series or movie that it belongs to
    content_title: str | None = None
    content_type: str | None = None


@dataclass(frozen=True)
class TrackingPosition:
    """Where the next poll of a service begins."""

    since: datetime  # downloads that ended earlier are ignored
    at: datetime
    cursor: Mapping[str, Any] = field(default_factory=dict[str, Any])  # as the last poll returned it


@dataclass(frozen=True)
class DownloadSnapshot:
    """The result of a poll."""

    active: tuple[ActiveDownload, ...]
    finished: tuple[FinishedDownload, ...]
    cursor: dict[str, Any]
    has_throughput: bool = True  # whether the service downloads at all; if not, no single download is at fault


@dataclass(frozen=True)
class Grab:
    """A service's record of the release that it selected for a download, and of how the download ended."""

    id: int
    title: str
    content: tuple[str, ...]
    tags: tuple[str, ...]
    failed: bool
    imported: bool


@dataclass(frozen=True)
class ReplacementActions:
    find: Callable[[Client, str], Awaitable[ActiveDownload | None]]
    # With its files, and blocklisted. The flag: whether the service then searches. False: it was gone already.
    remove: Callable[[Client, str, bool], Awaitable[bool]]
    find_grab: Callable[[Client, str], Awaitable[Grab | None]]  # by the download's id
    mark_failed: Callable[[Client, int], Awaitable[None]]  # by the grab's id
    searches_automatically: Callable[[Client], Awaitable[bool]]  # after a download has failed
    search: Callable[[Client, tuple[str, ...]], Awaitable[None]]
    is_searching: Callable[[Client, tuple[str, ...], datetime], Awaitable[bool]]  # for exactly this, since then


@dataclass(frozen=True)
class FinishedFolders:
    """The folders of finished downloads, on the service's machine."""

    folder: str
    subfolders: tuple[str, ...]  # of its categories
    known_folders: frozenset[str]  # folders that its history still contains


@dataclass(frozen=True)
class DownloadTracker:
    poll: Callable[[Client, TrackingPosition], Awaitable[DownloadSnapshot]]
    retry: Callable[[Client, str], Awaitable[str]] | None = None  # as in `Downloads`
    replacement: ReplacementActions | None = None
    finished_folders: Callable[[Client], Awaitable[FinishedFolders]] | None = None


def to_single_line(text: str | None) -> str:
    """Return a service's text as it is stored: one line, of limited length."""
    return " ".join((text or "").replace("\0", "").split())[:MAX_TEXT_LENGTH]
