"""Check whether a job may register a model, before it does the work."""

import asyncio

from cluster.errors import Unavailable
from cluster.ownership import Principal
from cluster.settings import get_settings
from jobs import outputs
from jobs.context import Context
from pipelines.training.models import registry, storage_limit


def require_name(context: Context, name: str) -> Principal:
    """Raise an error if the owner of the job may not register under this name, or has no room. Returns the owner."""
    owner = outputs.find_owner(context.owner_id)
    if not owner.is_admin:
        asyncio.run(_require_name(owner, name))
    return owner


def check_early(context: Context, name: str) -> None:
    """Do the same before a training. It needs no registry, so it goes on without one: the export checks again."""
    if get_settings().mlflow_uri is None:
        asyncio.run(storage_limit.require_room(None, outputs.find_owner(context.owner_id)))
        return
    try:
        require_name(context, name)
    except Unavailable as error:
        context.log(f"Whether the name '{name}' is free is not known yet: {error.message}", "WARNING")


async def _require_name(owner: Principal, name: str) -> None:
    async with registry.connect() as models:
        await models.require_name(name, owner)
        await storage_limit.require_room(models, owner)
