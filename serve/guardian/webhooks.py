"""The route /webhooks: receives push events from GitHub, Gitea and GitLab."""

import asyncio
import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field
from pydantic.json_schema import SkipJsonSchema
from sqlalchemy import or_, select

from cluster import secrets
from cluster.db import get_database
from cluster.errors import Unauthenticated
from cluster.ownership import system
from pipelines.guardian import watch_repo, webhooks
from pipelines.guardian.repositories import Repository
from pipelines.guardian.webhooks import Provider
from serve.http.json_body import ValueCounter
from serve.http.marks import access

router = APIRouter(prefix="/webhooks")

REQUEST_BODY_SCHEMA: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}
}


class WebhookRefused(Unauthenticated):
    """No registered repository has this address, with a secret that matches the signature."""

    code = "WEBHOOK_REFUSED"


class WebhookResponse(BaseModel):
    status: Literal["queued", "ignored", "pong"]
    reason: str | None = Field(default=None, description="Why the event was ignored.")
    job_ids: list[str] = Field(default_factory=list, description="The jobs that check the repository.")


@router.post("/{provider}", status_code=202, openapi_extra=REQUEST_BODY_SCHEMA)
@access("signed")
async def hear_webhook(
    provider: Provider,
    request: Request,
    repository: Annotated[
        Annotated[str, Field(max_length=100)] | SkipJsonSchema[None],
        Query(description="Id or name of the repository. Without it, the addresses in the payload select it."),
    ] = None,
) -> WebhookResponse:
    """Receive a push event, and queue a check of the repository.

    The event must be signed with the webhook secret of the repository. A repeated delivery creates no second job.
    """
    body = await request.body()
    headers = {name.lower(): value for name, value in request.headers.items()}
    candidates = await _candidates(repository)
    # In a thread, and nothing of the body is parsed before somebody who knows a secret has signed it.
    signed = await asyncio.to_thread(_signed, candidates, provider, headers, body)
    if not signed:
        raise WebhookRefused
    payload = await asyncio.to_thread(_parse, headers, body)
    verified = signed if repository is not None else _concerned(signed, payload)
    if not verified:
        raise WebhookRefused
    if webhooks.is_ping(provider, headers):
        return WebhookResponse(status="pong")
    if not webhooks.is_push(provider, headers):
        return WebhookResponse(status="ignored", reason="The event is not a push.")
    branch = webhooks.pushed_branch(payload)
    watched = [
        candidate
        for candidate in verified
        if candidate.enabled and branch in {candidate.branch or _default_branch(payload, branch)} - {None}
    ]
    if not watched:
        return WebhookResponse(status="ignored", reason="This branch is not watched.")
    digest = hashlib.sha256(body).hexdigest()
    async with get_database().transaction() as session:
        jobs = [
            await watch_repo.enqueue_watch(
                session, candidate, system("webhook"), idempotency_key=f"{candidate.id} {digest}"
            )
            for candidate in watched
        ]
        return WebhookResponse(status="queued", job_ids=[job.id for job in jobs])


async def _candidates(name_or_id: str | None) -> list[Repository]:
    """The repositories with a webhook secret that an event may concern."""
    query = select(Repository).where(Repository.webhook_secret.is_not(None))
    if name_or_id is not None:
        query = query.where(or_(Repository.id == name_or_id, Repository.name == name_or_id))
    else:
        query = query.where(Repository.url.is_not(None))
    async with get_database().read_transaction() as session:
        return list(await session.scalars(query.order_by(Repository.id)))


def _signed(
    candidates: list[Repository], provider: Provider, headers: Mapping[str, str], body: bytes
) -> list[Repository]:
    """The repositories whose secret has signed the body."""
    signed: list[Repository] = []
    broken: secrets.SealBroken | None = None
    for candidate in candidates:
        try:
            secret = secrets.unseal(candidate.webhook_secret or "")
        except secrets.SealBroken as error:
            broken = error  # others may have signed it
        else:
            if webhooks.is_signed(provider, headers, body, secret):
                signed.append(candidate)
    if broken and not signed:
        raise broken
    return signed


def _parse(headers: Mapping[str, str], body: bytes) -> dict[str, Any]:
    document = webhooks.payload_document(headers, body)
    ValueCounter().add(document)
    return webhooks.parse_payload(document)


def _concerned(candidates: list[Repository], payload: dict[str, Any]) -> list[Repository]:
    """The repositories whose address is in the payload."""
    repository_keys = webhooks.repository_keys(payload)
    return [candidate for candidate in candidates if webhooks.repository_key(candidate.url or "") in repository_keys]


def _default_branch(payload: dict[str, Any], pushed_branch: str | None) -> str | None:
    """The default branch of the repository. If the payload does not name it, the pushed branch counts as it."""
    return webhooks.default_branch(payload) or pushed_branch
