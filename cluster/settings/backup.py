"""Settings of scheduled backups."""

from pydantic import Field, SecretStr, ValidationInfo, field_validator

from cluster.settings.base import Section
from cluster.times import CronExpression

MIN_PASSPHRASE_LENGTH = 12


class BackupSettings(Section):
    passphrase: SecretStr | None = Field(
        min_length=MIN_PASSPHRASE_LENGTH,
        description="Encrypts backups. Without it nobody can restore them: keep it in another place too. "
        "Null: `forgearr backup` asks for one.",
    )
    schedule: CronExpression | None = Field(
        description="When a backup is made, in UTC: minute, hour, day, month, weekday. Null: only by `forgearr backup`."
    )
    folder: str | None = Field(
        description="Where scheduled backups are made; better on another disk. Null: `backups/` in FORGEARR_HOME."
    )
    keep: int = Field(ge=1, le=10_000, description="How many backups of this installation stay in that folder.")

    @field_validator("schedule")
    @classmethod
    def require_passphrase(cls, schedule: str | None, info: ValidationInfo) -> str | None:
        if schedule is not None and info.data.get("passphrase") is None:
            raise ValueError("scheduled backups are encrypted, so backup.passphrase has to be set too")
        return schedule
