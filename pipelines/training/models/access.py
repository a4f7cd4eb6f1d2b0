"""Who may see, share and delete the versions of models.

What a user has trained is private: its owner and administrators see it, and for anybody else it does not exist, as with
rows (cluster/ownership.py). Its owner may share it. A version that was served once is everybody's, and only
administrators change it. What nobody owns was made by administrators or the platform.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

from cluster.errors import Forbidden
from cluster.ownership import Principal
from pipelines.training.models import registry
from pipelines.training.models.versions import Model, Version, parse_reference, unknown_model, unknown_version


class NotModelOwner(Forbidden):
    """Only an administrator may change what others have made."""

    code = "NOT_YOUR_MODEL"


def can_see(version: Version, principal: Principal) -> bool:
    return principal.is_admin or version.visibility != "private" or _is_own(version, principal)


def require_visible(version: Version, principal: Principal, reference: str) -> Version:
    """This version, if the principal may see it. `reference` is the name by which it was found."""
    if not can_see(version, principal):
        raise unknown_version(reference)
    return version


def visible_models(models: Iterable[Model], principal: Principal) -> list[Model]:
    """These models with the versions that the principal may see, without models that have none."""
    visible = (_visible_part(model, principal) for model in models)
    return [model for model in visible if model.versions]


def visible_model(model: Model, principal: Principal) -> Model:
    visible = _visible_part(model, principal)
    if not visible.versions:
        raise unknown_model(model.name)
    return visible


def require_change(version: Version, principal: Principal) -> None:
    """Raise an error unless the principal may share or delete this version."""
    if principal.is_admin or (_is_own(version, principal) and version.visibility != "served"):
        return
    reason = "because it was served" if _is_own(version, principal) else "which is not yours"
    raise NotModelOwner(f"Only an administrator may change or delete {version.reference}, {reason}.")


async def set_visibility(reference: str, visibility: Literal["private", "shared"], principal: Principal) -> Version:
    """Share a version with everybody, or make it private again. Returns the changed version."""
    name, number = parse_reference(reference)
    assert number is not None
    async with registry.connect() as models:
        version = require_visible(await models.find(reference), principal, reference)
        require_change(version, principal)
        await models.set_visibility(name, number, visibility)
    return replace(version, visibility=visibility)


def _visible_part(model: Model, principal: Principal) -> Model:
    versions = [version for version in model.versions if can_see(version, principal)]
    served = model.served if model.served is not None and can_see(model.served, principal) else None
    return Model(model.name, served, versions)


def _is_own(version: Version, principal: Principal) -> bool:
    return principal.id is not None and version.owner_id == principal.id
