"""Decide whether a repository has changed enough to retrain its model, and whether that is allowed now."""

import re
from collections.abc import Iterable
from datetime import datetime, time, timedelta
from functools import cache
from typing import Annotated
from zoneinfo import ZoneInfo

from pydantic import BaseModel, ConfigDict, Field

from cluster.times import TimeZoneName, UtcTime
from pipelines.guardian.git.objects import Changes

HOUR = timedelta(hours=1)
CLOCK = r"([01]\d|2[0-3]):[0-5]\d"

Pattern = Annotated[str, Field(min_length=1, max_length=200)]


class Policy(BaseModel):
    """The thresholds for changes since the last training. One of them is enough. Null disables a threshold."""

    model_config = ConfigDict(extra="forbid")

    min_commits: int | None = Field(default=None, ge=1, description="This many commits.")
    min_files: int | None = Field(default=20, ge=1, description="This many files.")
    min_lines: int | None = Field(default=None, ge=1, description="This many lines, added or removed.")
    critical_paths: list[Pattern] = Field(
        default=[],
        max_length=100,
        description="Any file that matches one of these: src/core/** or *.proto. A pattern without a slash matches in "
        "every folder.",
    )
    min_hours: float | None = Field(default=1, gt=0, le=8760, description="The minimum hours since the last training.")
    quiet_hours: str | None = Field(
        default=None, pattern=rf"^{CLOCK}-{CLOCK}$", examples=["22:00-06:00"], description="No training in these hours."
    )
    timezone: TimeZoneName = Field(default="UTC", description="Of the quiet hours: an IANA name.")


class Metrics(BaseModel):
    commits_since_last_train: int | None = Field(description="Null: unknown, because the history is shallow.")
    files_changed: int
    lines_changed: int
    critical_paths_changed: bool
    hours_since_last_train: float | None = Field(description="Null: never trained.")
    feedback_since_last_train: int | None = Field(description="Null: not counted.")
    rewritten: bool = Field(description="Whether the last commit trained from is no longer in the history.")


class Decision(BaseModel):
    """Whether to train now, and why."""

    should_retrain: bool
    reason: str
    metrics: Metrics
    limits: Policy = Field(description="The policy that was applied.")
    checked_at: UtcTime


def decide(
    policy: Policy, changes: Changes, trained_at: datetime | None, now: datetime, feedback: int | None = None
) -> Decision:
    """Apply the policy to these changes. `trained_at` is when the last training succeeded."""
    critical = _critical_path(policy.critical_paths, changes.paths)
    hours = None if trained_at is None else max(now - trained_at, timedelta(0)) / HOUR
    should_retrain, reason = _check_thresholds(policy, changes, critical, trained_at)
    if should_retrain and (block_reason := _block_reason(policy, hours, now)):
        should_retrain, reason = False, f"{reason}, but {block_reason}"
    return Decision(
        should_retrain=should_retrain,
        reason=reason,
        metrics=Metrics(
            commits_since_last_train=changes.commits,
            files_changed=changes.files,
            lines_changed=changes.lines,
            critical_paths_changed=critical is not None,
            hours_since_last_train=None if hours is None else round(hours, 2),
            feedback_since_last_train=feedback,
            rewritten=changes.rewritten,
        ),
        limits=policy,
        checked_at=now,
    )


def _check_thresholds(
    policy: Policy, changes: Changes, critical: str | None, trained_at: datetime | None
) -> tuple[bool, str]:
    if trained_at is None:
        return True, "never trained"
    if not changes.files:
        return False, "nothing has changed since the last training"
    if critical is not None:
        return True, f"a critical path changed: {critical}"
    counted = [
        (changes.files, policy.min_files, "file"),
        (changes.commits, policy.min_commits, "commit"),
        (changes.lines, policy.min_lines, "line"),
    ]
    checked = [(count, limit, unit) for count, limit, unit in counted if limit is not None]
    known = [(count, limit, unit) for count, limit, unit in checked if count is not None]
    for count, limit, unit in known:
        if count >= limit:
            return True, _describe_threshold(count, limit, unit)
    if known:
        return False, ", ".join(_describe_threshold(count, limit, unit) for count, limit, unit in known)
    if checked:
        return False, f"{changes.files} files changed, but the shallow history does not say how many commits"
    return False, f"{changes.files} files changed, none of them on a critical path"


def _describe_threshold(count: int, limit: int, unit: str) -> str:
    return f"{count} {unit}{'' if count == 1 else 's'} changed (threshold: {limit})"


def _block_reason(policy: Policy, hours: float | None, now: datetime) -> str | None:
    if policy.min_hours is not None and hours is not None and hours < policy.min_hours:
        return f"the last training was {hours:.1f} hours ago (at least {policy.min_hours:g})"
    if policy.quiet_hours is not None:
        begin, end = (time.fromisoformat(clock) for clock in policy.quiet_hours.split("-"))
        clock = now.astimezone(ZoneInfo(policy.timezone)).time()
        # If the end is before the beginning, the hours span midnight.
        if begin <= clock < end if begin <= end else clock >= begin or clock < end:
            return f"these are quiet hours, until {end:%H:%M} ({policy.timezone})"
    return None


def _critical_path(patterns: Iterable[str], paths: Iterable[str]) -> str | None:
    """The first path that matches a pattern."""
    expressions = [_glob_to_regex(pattern) for pattern in patterns]
    return next((path for path in paths if any(expression.fullmatch(path) for expression in expressions)), None)


@cache
def _glob_to_regex(pattern: str) -> re.Pattern[str]:
    """`*` matches anything but a slash, `**` matches anything, and a folder matches all files in it."""
    glob = pattern.removeprefix("/")
    if "/" not in glob.removesuffix("/") and not pattern.startswith("/"):
        glob = f"**/{glob}"
    if glob.endswith("/"):
        glob += "**"
    glob = re.sub(r"(\*\*/)+", "**/", glob)
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", glob)
    wildcards = {"**/": r"(?:.*/)?", "**": r".*", "*": r"[^/]*", "?": r"[^/]"}
    return re.compile("".join(wildcards.get(part) or re.escape(part) for part in parts), re.DOTALL)
