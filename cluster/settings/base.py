"""What all sections of the settings share."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

LOOPBACK = {"127.0.0.1", "localhost", "::1"}


# How many in what time, as the limits library reads it: 100/minute, 10 per 15 minutes.
Rate = Annotated[str, Field(pattern=r"^[1-9]\d* ?(/|per) ?([1-9]\d* ?)?(second|minute|hour|day|month|year)s?$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def home() -> Path:
    """The folder that holds all state of this installation, made on first use."""
    folder = Path(os.environ.get("FORGEARR_HOME") or Path.home() / ".forgearr").expanduser().absolute()
    if not folder.exists():
        folder.mkdir(parents=True, mode=0o700)
    return folder
