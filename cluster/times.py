"""Times as people write and read them. In between, a time is an aware datetime in UTC."""

import re
from datetime import UTC, datetime
from typing import Annotated

from pydantic import AfterValidator, AwareDatetime, BeforeValidator, Field, PlainSerializer

DATE = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)


def _written_out(value: object) -> object:
    # 60 may be meant as a minute from now, and would be read as one from 1970.
    if isinstance(value, datetime) or (isinstance(value, str) and DATE.match(value)):
        return value
    raise ValueError("must be a time such as 2026-11-21T08:30:00Z")


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("must lie in the years 1 to 9999, in UTC too") from None


def _shown(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


GivenTime = Annotated[AwareDatetime, Field(strict=False), AfterValidator(_in_utc), BeforeValidator(_written_out)]
"""A time in a request: with a time zone, and not a number."""
UtcTime = Annotated[datetime, PlainSerializer(_shown, return_type=str, when_used="json")]
"""A time in an answer: UTC with Z."""
