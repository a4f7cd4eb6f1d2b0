"""Settings of audits, and of the recovery of downloads."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from cluster.settings.base import Section
from cluster.times import CronExpression


class MediaSettings(Section):
    watch_cron: CronExpression = Field(
        description="When downloads are polled: minute, hour, day, month, weekday. Used when the first service is "
        "added; after that, change the schedule `watch-downloads`."
    )
    history_days: float = Field(
        gt=0, le=10_000, description="How long finished downloads, and the decisions about them, are stored."
    )
    folders: dict[str, str] = Field(
        description="Local paths of services' folders, if they differ ({/downloads: /mnt/nas/downloads}). Folders that "
        "do not exist on this machine are not searched."
    )


class RecoverySettings(Section):
    """The default recovery policy. An administrator can replace it over the API."""

    enabled: bool = Field(description="Whether failed and stuck downloads are recovered at all.")
    dry_run: bool = Field(description="Only report what would be done.")
    strikes: int = Field(
        ge=1, le=1000, description="Number of polls in a row without progress after which a download may be stuck."
    )
    stuck_minutes: float = Field(
        ge=0, le=100_000, description="Minutes without progress after which such a download is stuck."
    )
    grace_minutes: float = Field(
        ge=0, le=100_000, description="Time that Sonarr, Radarr and others get to handle a failure themselves."
    )
    cooldown_minutes: float = Field(
        ge=0,
        le=100_000,
        description="Time after an action in which the download, and others of its title, are left alone.",
    )
    max_per_hour: int = Field(ge=0, le=10_000, description="Maximum number of actions per hour.")
    max_retries: int = Field(
        ge=0, le=100, description="How often a failed download is retried if no other service requested it."
    )
    search_again: bool = Field(description="Whether to search for another release when one is removed.")
    protected_tags: list[str] = Field(
        max_length=100,
        description="Downloads with one of these tags, or in a category of this name, are never changed.",
    )
    leave_messages: list[str] = Field(
        max_length=100,
        description="Parts of messages about downloads that only a person can repair. Upper and lower case are equal.",
    )
    leftovers: Literal["report", "remove"] = Field(
        description="What to do with folders of failed downloads that SABnzbd no longer lists."
    )
    leftover_days: float = Field(gt=0, le=10_000, description="Age at which such a folder may be removed.")


class AuditSettings(Section):
    rules: Path | None = Field(
        description="Folder with your own rules (*.yaml) for audits of services. Null: `audit` in FORGEARR_HOME."
    )
    history_days: float = Field(gt=0, description="How long audits, and closed or applied recommendations, are stored.")
