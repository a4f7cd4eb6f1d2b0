"""The capability to list and control downloads, and the public schemas of downloads."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from pydantic import BaseModel, Field

from cluster.errors import Conflict, NotFound
from cluster.services.http.client import Client
from cluster.times import UtcTime


class DownloadNotFound(NotFound):
    """There is no such download."""

    code = "DOWNLOAD_NOT_FOUND"


class DownloadNotFailed(Conflict):
    """Only a failed download can be retried."""

    code = "DOWNLOAD_NOT_FAILED"


class QueuedDownload(BaseModel):
    nzo_id: str
    filename: str
    mb_left: float = Field(description="In MiB, like `mb`.")
    mb: float
    percentage: int
    eta: str | None = Field(description="Hours, minutes and seconds. Null: unknown.", examples=["00:15:30"])
    status: str = Field(examples=["Downloading"])
    priority: str = Field(examples=["Normal"])


class DownloadQueue(BaseModel):
    queue: list[QueuedDownload]
    speed: str = Field(examples=["5.2 MB/s"])
    size_left: str = Field(examples=["15.2 GB"])
    paused: bool
    disk_space: str | None = Field(description="Free space for incomplete downloads.", examples=["250.5 GB"])


class DownloadHistoryItem(BaseModel):
    nzo_id: str
    name: str
    category: str | None
    status: str = Field(description="Completed, Failed, or the step that runs.", examples=["Completed"])
    fail_message: str
    size: str = Field(examples=["1.5 GB"])
    completed: UtcTime | None = Field(description="When it ended. Null: it has not ended yet.")


class DownloadHistory(BaseModel):
    history: list[DownloadHistoryItem] = Field(description="Newest first.")
    total: int = Field(description="Number of all downloads in the history.")


class QueuePauseState(BaseModel):
    """The state of the queue after it was paused or resumed."""

    success: bool = True
    paused: bool
    queue_status: str = Field(examples=["Downloading"])


@dataclass(frozen=True)
class Downloads:
    """Each function that changes something verifies the effect, and raises an error if there is none."""

    queue: Callable[[Client], Awaitable[DownloadQueue]]
    history: Callable[[Client, int], Awaitable[DownloadHistory]]  # with a limit
    retry: Callable[[Client, str], Awaitable[str]]  # returns the id of the new attempt
    delete: Callable[[Client, str, bool], Awaitable[None]]  # true: also delete its files
    pause: Callable[[Client], Awaitable[QueuePauseState]]
    resume: Callable[[Client], Awaitable[QueuePauseState]]
