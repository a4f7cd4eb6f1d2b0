"""Settings of the guardian."""

from pathlib import Path

from pydantic import Field, field_validator

from cluster.settings.base import Section
from cluster.times import CronExpression


class GuardianSettings(Section):
    roots: list[Path] = Field(
        description="Folders under which repositories may lie. A relative path is looked for in each of them in turn."
    )
    watch_cron: CronExpression = Field(
        description="How often all repositories are looked at: minute, hour, day, month, weekday. Read when the first "
        "repository is registered; the schedule `watch-repositories` can be changed from then on."
    )
    min_samples: int = Field(ge=1, description="Samples that a retraining needs to learn from; with fewer it stops.")
    min_improvement: float = Field(
        ge=0,
        lt=1,
        description="How much better than the served version a retrained one must be to take its place: the part by "
        "which it needs fewer bits per character of held-out answers.",
    )
    min_feedback: int | None = Field(
        ge=1, description="New feedback on a model, with something to learn in it, that retrains it. Null: never."
    )
    held_out: float = Field(
        ge=0, le=0.5, description="Part of a repository's files that is never learned from, only asked about."
    )
    max_characters: int = Field(
        ge=500, le=1_000_000, description="How long one example from a repository may be, question and answer together."
    )
    max_file_kb: int = Field(ge=1, le=100_000, description="Larger files of a repository are not read.")
    commits: int = Field(ge=0, le=100_000, description="How many of its newest commits are learned from.")

    @field_validator("roots")
    @classmethod
    def validate_roots(cls, roots: list[Path]) -> list[Path]:
        if not roots or not all(root.is_absolute() or root.parts[:1] == ("~",) for root in roots):
            raise ValueError("must be one folder or more, each beginning with / or ~")
        return roots
