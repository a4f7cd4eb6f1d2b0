"""Times as every answer writes them: UTC with Z."""

from datetime import UTC, datetime
from typing import Annotated

from pydantic import PlainSerializer


def _written(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


UtcTime = Annotated[datetime, PlainSerializer(_written, return_type=str, when_used="json")]
