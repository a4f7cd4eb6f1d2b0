"""Settings of the guardian, which watches repositories and retrains their models."""

from pathlib import Path

from pydantic import Field, field_validator

from cluster.settings.base import Section
from cluster.times import CronExpression


class GuardianSettings(Section):
    roots: list[Path] = Field(
        description="Folders that may contain repositories. A relative path is searched in each of them, in this order."
    )
    watch_cron: CronExpression = Field(
        description="When all repositories are checked: minute, hour, day, month, weekday. Used when the first "
        "repository is registered; after that, change the schedule `watch-repositories`."
    )
    min_samples: int = Field(ge=1, description="Minimum number of training samples. A retraining with fewer stops.")
    min_improvement: float = Field(
        ge=0,
        lt=1,
        description="Improvement over the served version that a retrained one needs to replace it: the share by which "
        "its bits per character of held-out answers are lower.",
    )
    min_feedback: int | None = Field(
        ge=1, description="Number of new, usable items of feedback on a model after which it is retrained. Null: never."
    )
    held_out: float = Field(
        ge=0, le=0.5, description="Share of a repository's files that is held out of training, for the evaluation."
    )
    max_characters: int = Field(
        ge=500, le=1_000_000, description="Maximum length of a sample from a repository, question and answer together."
    )
    max_file_kb: int = Field(ge=1, le=100_000, description="Larger files of a repository are not read.")
    commits: int = Field(ge=0, le=100_000, description="Number of newest commits of a repository that become samples.")

    @field_validator("roots")
    @classmethod
    def validate_roots(cls, roots: list[Path]) -> list[Path]:
        if not roots or not all(root.is_absolute() or root.parts[:1] == ("~",) for root in roots):
            raise ValueError("must be at least one folder, each beginning with / or ~")
        return roots
