"""Settings of outside services."""

from pydantic import Field, SecretStr

from cluster.settings.base import Section
from cluster.times import CronExpression


class DeclaredService(Section):
    """An outside service in `services.declared`. Its type and url are checked when Forgearr starts."""

    name: str = Field(min_length=1, max_length=100)
    type: str
    url: str
    api_key: SecretStr | None = Field(default=None, min_length=1)
    verify_tls: bool = True
    enabled: bool = True


class ServiceSettings(Section):
    declared: list[DeclaredService] = Field(
        description="Outside services (name, type, url, api_key, verify_tls, enabled), besides those that are added "
        "over the API. There they can be seen, but not changed."
    )
    timeout_seconds: float = Field(gt=0, le=600, description="How long a service may take for an answer.")
    check_cron: CronExpression = Field(
        description="How often all services are checked: minute, hour, day, month, weekday. Read when the first "
        "service is added; the schedule `check-services` can be changed from then on."
    )
    history_days: float = Field(gt=0, description="How long the results of those checks are kept.")
    breaker_threshold: int = Field(
        ge=1, le=1000, description="How many failures in a row make Forgearr leave a service alone."
    )
    breaker_seconds: float = Field(gt=0, le=86400, description="For how long, before it is tried again.")
