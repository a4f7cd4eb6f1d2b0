"""What a service that downloads can be asked, and what is told of its downloads."""

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
    """Only a download that has failed can be tried again."""

    code = "DOWNLOAD_NOT_FAILED"


class QueuedDownload(BaseModel):
    nzo_id: str
    filename: str
    mb_left: float = Field(description="In MiB, as `mb` is.")
    mb: float
    percentage: int
    eta: str | None = Field(description="Hours, minutes and seconds. Null: nobody knows.", examples=["00:15:30"])
    status: str = Field(examples=["Downloading"])
    priority: str = Field(examples=["Normal"])


class DownloadQueue(BaseModel):
    queue: list[QueuedDownload]
    speed: str = Field(examples=["5.2 MB/s"])
    size_left: str = Field(examples=["15.2 GB"])
    paused: bool
    disk_space: str | None = Field(description="What is free where downloads begin.", examples=["250.5 GB"])


class DownloadHistoryItem(BaseModel):
    nzo_id: str
    name: str
    category: str | None
    status: str = Field(description="Completed, Failed, or what is still done to it.", examples=["Completed"])
    fail_message: str
    size: str = Field(examples=["1.5 GB"])
    completed: UtcTime | None = Field(description="When it ended. Null: it has not ended yet.")


class DownloadHistory(BaseModel):
    history: list[DownloadHistoryItem] = Field(description="The latest first.")
    total: int = Field(description="How many there are, shown or not.")


class QueuePauseState(BaseModel):
    """How the queue is after it was paused, or resumed."""

    success: bool = True
    paused: bool
    queue_status: str = Field(examples=["Downloading"])


@dataclass(frozen=True)
class Downloads:
    """All of them look whether it has come to what they were to do, and raise an error if not."""

    queue: Callable[[Client], Awaitable[DownloadQueue]]
    history: Callable[[Client, int], Awaitable[DownloadHistory]]  # at most so many
    retry: Callable[[Client, str], Awaitable[str]]  # returns the id of the new attempt
    delete: Callable[[Client, str, bool], Awaitable[None]]  # true: and what it has downloaded so far
    pause: Callable[[Client], Awaitable[QueuePauseState]]
    resume: Callable[[Client], Awaitable[QueuePauseState]]
