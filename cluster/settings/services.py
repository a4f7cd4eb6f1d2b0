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
        "over the API. The API shows them, but cannot change them."
    )
    timeout_seconds: float = Field(gt=0, le=600, description="Timeout for responses of a service.")
    check_cron: CronExpression = Field(
        description="When all services are checked: minute, hour, day, month, weekday. Used when the first service is "
        "added; after that, change the schedule `check-services`."
    )
    history_days: float = Field(gt=0, description="How long the results of those checks are stored.")
    breaker_threshold: int = Field(
        ge=1, le=1000, description="Number of failures in a row after which the circuit breaker of a service opens."
    )
    breaker_seconds: float = Field(
        gt=0, le=86400, description="How long it stays open before the service is called again."
    )
