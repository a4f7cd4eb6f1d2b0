"""Settings of audits, and of the recovery of downloads."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from cluster.settings.base import Section
from cluster.times import CronExpression


class MediaSettings(Section):
    watch_cron: CronExpression = Field(
        description="How often downloads are looked at: minute, hour, day, month, weekday. Read when the first service "
        "is added; the schedule `watch-downloads` can be changed from then on."
    )
    history_days: float = Field(
        gt=0, le=10_000, description="How long downloads that have ended, and what was decided about them, are kept."
    )
    folders: dict[str, str] = Field(
        description="Where folders of services lie on this machine ({/downloads: /mnt/nas/downloads}), if not under "
        "the same path. What is nowhere here is not looked into."
    )


class RecoverySettings(Section):
    """The policy of recoveries, until an administrator has set another one."""

    enabled: bool = Field(description="Whether failed and stuck downloads are looked into at all.")
    dry_run: bool = Field(description="Only say what would be done.")
    strikes: int = Field(
        ge=1, le=1000, description="How many looks in a row must have seen no progress, before a download is stuck."
    )
    stuck_minutes: float = Field(ge=0, le=100_000, description="And for how long there must have been none.")
    grace_minutes: float = Field(
        ge=0, le=100_000, description="How long Sonarr and its like may take to deal with a failure themselves."
    )
    cooldown_minutes: float = Field(
        ge=0, le=100_000, description="How long a download, or one of the same title, is left alone after an action."
    )
    max_per_hour: int = Field(ge=0, le=10_000, description="How many actions an hour may see.")
    max_retries: int = Field(
        ge=0, le=100, description="How often a failed download that nobody else knows is fetched again."
    )
    search_again: bool = Field(description="Have another release searched for, when one is removed.")
    protected_tags: list[str] = Field(
        max_length=100,
        description="What has one of these tags, or lies in a category of this name, is never touched.",
    )
    leave_messages: list[str] = Field(
        max_length=100,
        description="What is said of a download that only a person can help: words of it, whatever their capitals.",
    )
    leftovers: Literal["report", "remove"] = Field(
        description="What becomes of folders of failed downloads that SABnzbd no longer knows."
    )
    leftover_days: float = Field(gt=0, le=10_000, description="How old such a folder must be to be removed.")


class AuditSettings(Section):
    rules: Path | None = Field(
        description="Folder with rules of your own (*.yaml) for audits of services. Null: `audit` in FORGEARR_HOME."
    )
    history_days: float = Field(gt=0, description="How long audits are kept, and what was closed or applied.")
