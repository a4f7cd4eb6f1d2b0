"""Parse, validate and format times, durations and cron expressions. Internally, times are aware datetimes in UTC."""

import re
from datetime import UTC, datetime
from typing import Annotated
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError
from pydantic import AfterValidator, AwareDatetime, BeforeValidator, Field, PlainSerializer

UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)")
DURATION = re.compile(r"(-?)((?:\d+(?:\.\d+)?(?:ns|us|µs|ms|s|m|h))+|0)")
DATE = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)


def parse_duration(duration: float | str) -> float | None:
    """Return the seconds of a number or of a duration such as 1h30m. A negative one means "no limit": None."""
    if not isinstance(duration, str):
        return None if duration < 0 else float(duration)
    match = DURATION.fullmatch(duration)
    if match is None:
        raise ValueError("must be a number of seconds, or a duration such as 5m or 1h30m")
    return None if match[1] else sum(float(number) * UNITS[unit] for number, unit in DURATION_PART.findall(match[2]))


def _validate_zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"'{name}' is not an IANA time zone such as Europe/Berlin") from None
    return name


def _validate_cron(expression: str) -> str:
    try:
        next(CronSim(expression, datetime.now(UTC)))
    except (CronSimError, StopIteration):
        raise ValueError(f"'{expression}' is not a cron expression of five fields that ever fires") from None
    return expression


def _require_timestamp(value: object) -> object:
    # A number is ambiguous: 60 could be one minute from now, but would be parsed as a time in 1970.
    if isinstance(value, datetime) or (isinstance(value, str) and DATE.match(value)):
        return value
    raise ValueError("must be a time such as 2026-11-21T08:30:00Z")


def _to_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("must be in the years 1 to 9999, also in UTC") from None


def format_utc(moment: datetime) -> str:
    """Format a time like 2026-11-21T08:30:00Z."""
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


RequestTime = Annotated[
    AwareDatetime, Field(strict=False), AfterValidator(_to_utc), BeforeValidator(_require_timestamp)
]
"""A time in a request. It must have a time zone; numbers are refused."""
UtcTime = Annotated[datetime, PlainSerializer(format_utc, return_type=str, when_used="json")]
"""A time in a response, in UTC with Z."""
CronExpression = Annotated[str, Field(max_length=100), AfterValidator(_validate_cron)]
"""Five fields: minute, hour, day, month, weekday."""
TimeZoneName = Annotated[str, Field(max_length=64), AfterValidator(_validate_zone)]
"""The IANA name of a time zone."""
