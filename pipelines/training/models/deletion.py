"""Delete models by their public names. What is served is deleted by nobody."""

from cluster import audit_log
from cluster.errors import Forbidden
from cluster.ownership import Principal
from pipelines.training.models import access, registry, tiny
from pipelines.training.models import versions as models_versions
from pipelines.training.models.versions import Version


class BuiltInModel(Forbidden):
    """forgearr/tiny is built in and cannot be deleted."""

    code = "MODEL_COMES_ALONG"


async def remove(reference: str, principal: Principal) -> list[Version]:
    """Delete a version (NAME:v3), or all versions of a model that the principal sees. Returns the deleted ones."""
    if reference.removesuffix(":latest") == tiny.NAME:
        raise BuiltInModel
    name, number = models_versions.parse_reference(reference)
    async with registry.connect() as models:
        model = access.visible_model(await models.model(name), principal)
        versions = [version for version in model.versions if number in {None, version.number}]
        if not versions:
            raise models_versions.unknown_version(reference)
        for version in versions:
            access.require_change(version, principal)
        await models.delete_versions(name, [version.number for version in versions])
    deleted = [version.number for version in versions]
    await audit_log.record_alone("model.delete", principal, reference, versions=deleted)
    return versions
