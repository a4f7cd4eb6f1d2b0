"""/webhooks: where GitHub, Gitea and GitLab tell of a push."""

import asyncio
import hashlib
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field
from pydantic.json_schema import SkipJsonSchema
from sqlalchemy import or_, select

from cluster import secrets
from cluster.db import get_database
from cluster.errors import Unauthenticated
from cluster.ownership import Owner
from pipelines.guardian import watch_repo, webhooks
from pipelines.guardian.repositories import Repository
from pipelines.guardian.webhooks import Provider
from serve.http.errors import ERROR_RESPONSES

router = APIRouter(prefix="/webhooks", tags=["Guardian"], responses=ERROR_RESPONSES)

BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}
}


class WebhookRefused(Unauthenticated):
    """No repository here is known by this address with this signature."""

    code = "WEBHOOK_REFUSED"


class WebhookAnswer(BaseModel):
    status: Literal["queued", "ignored", "pong"]
    reason: str | None = Field(default=None, description="Why nothing was done.")
    job_ids: list[str] = Field(default_factory=list, description="The jobs that look at the repository.")


@router.post("/{provider}", status_code=202, openapi_extra=BODY)
async def hear_webhook(
    provider: Provider,
    request: Request,
    repository: Annotated[
        Annotated[str, Field(max_length=100)] | SkipJsonSchema[None],
        Query(description="Which repository is meant: its id or name. Without it, the one of the payload's addresses."),
    ] = None,
) -> WebhookAnswer:
    """A push, signed with the secret of the repository that it is about: look whether to learn from it. The same
    delivery told again makes no second job."""
    body = await request.body()
    headers = {name.lower(): value for name, value in request.headers.items()}
    payload = webhooks.read(headers, body)
    meant = await _meant(repository, payload)
    signed = await asyncio.to_thread(
        lambda: [
            one
            for one in meant
            if webhooks.is_signed(provider, headers, body, secrets.unseal(one.webhook_secret or ""))
        ]
    )
    if not signed:
        raise WebhookRefused
    if webhooks.is_ping(provider, headers):
        return WebhookAnswer(status="pong")
    if not webhooks.is_push(provider, headers):
        return WebhookAnswer(status="ignored", reason="It is no push.")
    branch = webhooks.pushed_branch(payload)
    watched = [one for one in signed if one.enabled and branch in {one.branch or _default(payload, branch)} - {None}]
    if not watched:
        return WebhookAnswer(status="ignored", reason="Nobody watches this branch.")
    digest = hashlib.sha256(body).hexdigest()
    async with get_database().transaction() as session:
        asked = [
            await watch_repo.ask_to_watch(session, one, Owner(name="webhook"), idempotency_key=f"{one.id} {digest}")
            for one in watched
        ]
        return WebhookAnswer(status="queued", job_ids=[job.id for job in asked])


async def _meant(named: str | None, payload: dict[str, Any]) -> list[Repository]:
    """The repositories that this may be about, as far as they have a secret."""
    wanted = select(Repository).where(Repository.webhook_secret.is_not(None))
    if named is not None:
        wanted = wanted.where(or_(Repository.id == named, Repository.name == named))
    else:
        wanted = wanted.where(Repository.url.is_not(None))
    async with get_database().reading() as session:
        found = list(await session.scalars(wanted.order_by(Repository.id)))
    if named is not None:
        return found
    places = webhooks.places(payload)
    return [one for one in found if webhooks.place(one.url or "") in places]


def _default(payload: dict[str, Any], pushed: str | None) -> str | None:
    """The branch that is watched where none is named. Who does not say which that is means any."""
    return webhooks.default_branch(payload) or pushed
