"""A kind of job that tells when its first line ran."""

import time

from pydantic import BaseModel, ConfigDict

from jobs.context import Context
from jobs.registry import job


class StampSpec(BaseModel):
    """A stamp needs nothing."""

    model_config = ConfigDict(extra="forbid")


@job("stamp", spec=StampSpec)
def stamp(context: Context, spec: StampSpec) -> float:
    """Returns the time at its first line."""
    return time.time()
