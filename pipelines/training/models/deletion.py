"""Delete models by their public names. Administrators may delete any, others only what their own jobs made."""

from sqlalchemy import select

from cluster import audit_log
from cluster.db import get_database
from cluster.errors import Forbidden
from cluster.ownership import Principal
from jobs.tables import Job
from pipelines.training.models import registry, tiny
from pipelines.training.models import versions as models_versions
from pipelines.training.models.versions import ModelNotFound, Version


class NotModelOwner(Forbidden):
    """Only an administrator may delete what others have made."""

    code = "NOT_YOUR_MODEL"


class BuiltInModel(Forbidden):
    """forgearr/tiny is built in and cannot be deleted."""

    code = "MODEL_COMES_ALONG"


async def remove(reference: str, principal: Principal) -> list[Version]:
    """Delete a version (NAME:v3), or a model with all its versions (NAME, NAME:latest). Returns the deleted ones."""
    if reference.removesuffix(":latest") == tiny.NAME:
        raise BuiltInModel
    name, number = models_versions.parse_reference(reference)
    async with registry.connect() as models:
        model = await models.model(name)
        versions = [version for version in model.versions if number in {None, version.number}]
        if not versions:
            raise ModelNotFound(f"There is no model version {reference}.")
        if not principal.is_admin:
            await _require_own_models(versions, principal)
        if number is None:
            await models.delete_model(name)
        else:
            await models.delete_version(name, number)
    deleted = [version.number for version in versions]
    await audit_log.record_alone("model.delete", principal, reference, versions=deleted)
    return versions


async def _require_own_models(versions: list[Version], principal: Principal) -> None:
    job_ids = {version.job_id for version in versions}
    async with get_database().read_transaction() as session:
        own_ids = set(await session.scalars(select(Job.id).where(Job.id.in_(job_ids), Job.owner_id == principal.id)))
    if own_ids != job_ids:
        raise NotModelOwner(
            f"Only an administrator may delete {versions[0].name}, because not all of it was made by your own jobs."
        )
