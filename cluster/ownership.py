"""Who asks for something, and who owns what comes of it."""

from pydantic import BaseModel, ConfigDict


class Owner(BaseModel):
    """In whose name a job runs. Without an id it is this machine's own."""

    model_config = ConfigDict(frozen=True)

    id: str | None = None
    name: str = "local"
    is_admin: bool = True


LOCAL_OWNER = Owner()
