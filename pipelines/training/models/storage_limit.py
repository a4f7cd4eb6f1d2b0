"""How much the models of one account may take: the setting `limits.account_models_mb`.

It counts the models that trainings have stored, which the database knows, and the files of registered versions, which
MLflow knows.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Collection

from sqlalchemy import func, select

from cluster.db import Database, run_with_database
from cluster.identity.account_limits import MB, AccountLimitReached, limit_of
from cluster.ownership import Principal
from jobs.states import State
from jobs.tables import Job
from pipelines.training.models.registry import Registry

NAME = "models_mb"


async def require_room(models: Registry | None, principal: Principal) -> None:
    """For jobs, before their work: raise AccountLimitReached if the account's models take all that they may.

    Without a registry it counts what trainings have stored.
    """
    limit = limit_of(NAME)
    if limit is None or principal.is_admin or principal.id is None:
        return
    ids = [principal.id]
    trained = await asyncio.to_thread(run_with_database, lambda database: _trained_bytes(database, ids))
    registered = await _registered_bytes(models, ids) if models is not None else Counter[str]()
    used_bytes = (trained + registered)[principal.id]
    if used_bytes >= limit * MB:
        used = math.ceil(used_bytes / MB)
        raise AccountLimitReached(
            f"Your account has {used} MB of models, and may have {limit}. Delete versions of your models, or jobs that "
            "have trained some.",
            details={"resource": NAME, "used": used, "limit": limit},
        )


async def read_usage(database: Database, models: Registry, account_ids: Collection[str]) -> dict[str, int]:
    """The MB that the models of these accounts take."""
    if not account_ids:
        return {}
    used = await _trained_bytes(database, account_ids) + await _registered_bytes(models, account_ids)
    return {account: math.ceil(used[account] / MB) for account in account_ids}


async def _trained_bytes(database: Database, account_ids: Collection[str]) -> Counter[str]:
    query = (
        select(Job.owner_id, func.sum(Job.result["model_bytes"].as_integer()))
        .where(Job.kind == "fine_tune", Job.state == State.SUCCEEDED, Job.owner_id.in_(account_ids))
        .group_by(Job.owner_id)
    )
    async with database.read_transaction() as session:
        rows = await session.execute(query)
    return Counter({owner_id: int(total or 0) for owner_id, total in rows if owner_id is not None})


async def _registered_bytes(models: Registry, account_ids: Collection[str]) -> Counter[str]:
    # MLflow cannot filter by several values, so it sends all versions then.
    owner, *others = account_ids
    condition = "" if others else f"tags.`forgearr.owner_id` = '{owner}'"
    used = Counter[str]()
    for version in await models.versions(condition):
        files = [*version.files, version.adapter]
        used[version.owner_id or ""] += sum(file.bytes for file in files if file is not None)
    return used
