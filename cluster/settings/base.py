"""What all sections of the settings share, and the folder of the installation."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

LOOPBACK = {"127.0.0.1", "localhost", "::1"}


# A rate limit in the notation of the library `limits`: 100/minute, 10 per 15 minutes.
Rate = Annotated[str, Field(pattern=r"^[1-9]\d* ?(/|per) ?([1-9]\d* ?)?(second|minute|hour|day|month|year)s?$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def home() -> Path:
    """Return the folder with all state of this installation. It is created on first use."""
    folder = Path(os.environ.get("FORGEARR_HOME") or Path.home() / ".forgearr").expanduser().absolute()
    if not folder.exists():
        folder.mkdir(parents=True, mode=0o700)
    return folder
