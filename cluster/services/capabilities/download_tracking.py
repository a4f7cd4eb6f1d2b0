"""What it takes to follow the downloads of a service, and to mend what goes wrong with them.

A connector that can be followed has a `Following`. Those who only fetch can fetch once more (`retry`); those who
chose what is fetched can choose something else (`Replacing`). `pipelines/media/` knows no other way.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from cluster.services.http.client import Client

ActiveState = Literal[
    "waiting",  # for its turn, for the network, or because all is paused
    "running",  # bytes should come in
    "processing",  # it is unpacked, checked or imported
    "blocked",  # it is there, but is not imported
    "failed",
]
Outcome = Literal["completed", "failed", "imported"]
MAX_ID_LENGTH = 300
"""How long the name of a download can be, as it is kept here."""
MAX_TEXT_LENGTH = 500


@dataclass(frozen=True)
class ActiveDownload:
    """A download that has not ended."""

    id: str  # by which the service can be asked about it
    title: str
    state: ActiveState
    download_id: str | None  # as the download client calls it
    bytes_left: int | None = None
    reason: str = ""  # what the service says of it
    content: tuple[str, ...] = ()  # what it will be, such as episode:12
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class FinishedDownload:
    """A download that has ended, or that has become a part of a library."""

    id: str  # as it was called while it was underway
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
    """How far a service has been followed."""

    since: datetime  # what ended before then is no news
    at: datetime
    cursor: Mapping[str, Any] = field(default_factory=dict[str, Any])  # what the last look left


@dataclass(frozen=True)
class DownloadSnapshot:
    """What a look at a service has seen."""

    active: tuple[ActiveDownload, ...]
    finished: tuple[FinishedDownload, ...]
    cursor: dict[str, Any]
    has_throughput: bool = True  # whether it brings in anything at all: if not, that is no single download's fault


@dataclass(frozen=True)
class Grab:
    """That a service has chosen this download, and what it knows of its end."""

    id: int
    title: str
    content: tuple[str, ...]
    tags: tuple[str, ...]
    failed: bool
    imported: bool


@dataclass(frozen=True)
class ReplacementActions:
    find: Callable[[Client, str], Awaitable[ActiveDownload | None]]
    # For good, with its files; whether to search by itself. Returns False if it was gone already.
    remove: Callable[[Client, str, bool], Awaitable[bool]]
    find_grab: Callable[[Client, str], Awaitable[Grab | None]]  # by the download's id
    mark_failed: Callable[[Client, int], Awaitable[None]]  # a grab
    searches_automatically: Callable[[Client], Awaitable[bool]]  # after something has failed
    search: Callable[[Client, tuple[str, ...]], Awaitable[None]]
    is_searching: Callable[[Client, tuple[str, ...], datetime], Awaitable[bool]]  # since then, for just that


@dataclass(frozen=True)
class FinishedFolders:
    """Where finished downloads lie, on the service's machine."""

    folder: str
    subfolders: tuple[str, ...]  # of its categories
    known_folders: frozenset[str]  # folders that its history still speaks of


@dataclass(frozen=True)
class DownloadTracker:
    poll: Callable[[Client, TrackingPosition], Awaitable[DownloadSnapshot]]
    retry: Callable[[Client, str], Awaitable[str]] | None = None  # as in `Downloads`
    replacement: ReplacementActions | None = None
    finished_folders: Callable[[Client], Awaitable[FinishedFolders]] | None = None


def to_single_line(text: str | None) -> str:
    """What a service says, as it is kept."""
    return " ".join((text or "").replace("\0", "").split())[:MAX_TEXT_LENGTH]
