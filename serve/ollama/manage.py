"""/api/create, /api/copy, /api/pull and /api/delete, as Ollama has them: what makes and removes models."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from cluster.errors import ForgearrError
from pipelines.training.models import registry
from serve.engines.model_header import Header
from serve.http.disconnect import while_connected
from serve.http.error_handlers import as_forgearr_error
from serve.models.dependencies import engine_of, models_of
from serve.models.names import delete
from serve.ollama import create as ollama_create
from serve.ollama import pull as ollama_pull
from serve.ollama.create import Made, Status
from serve.ollama.model_schemas import (
    PROGRESS_ANSWER,
    CopyRequest,
    CreateRequest,
    DeleteRequest,
    Progress,
    PullRequest,
    PushRequest,
)
from serve.security.callers import AdminCaller, CurrentCaller, owner_of

router = APIRouter(prefix="/api", tags=["Ollama"])

NDJSON = "application/x-ndjson"


class NotPushed(ForgearrError):
    """Models are not pushed to a registry: there is none that this server knows. Deploying gives them to Ollama."""

    status = 501
    error = "not_implemented"
    code = "PUSH_NOT_SUPPORTED"


@router.post("/create", response_model=Progress, responses=PROGRESS_ANSWER)
async def create_model(request: Request, wanted: CreateRequest, caller: AdminCaller) -> Any:
    """Make a model of a GGUF file, of another model, or of an adapter, and serve it as NAME:latest."""

    async def describe(reference: str) -> Header:
        meant = await models_of(request).resolve(reference, owner_of(caller))
        return await engine_of(request).describe(meant.reference, meant.source)

    return await _told(request, ollama_create.create(wanted, describe), wanted.is_streamed)


@router.post("/pull", response_model=Progress, responses=PROGRESS_ANSWER)
async def pull_model(request: Request, wanted: PullRequest, caller: AdminCaller) -> Any:
    """Get a model: from a GGUF file on the server's machine (its path), or have the configured Ollama pull it."""
    return await _told(request, ollama_pull.pull(wanted), wanted.is_streamed)


@router.post("/push", responses={501: {"description": "Always"}})
async def push_model(wanted: PushRequest, caller: AdminCaller) -> Progress:
    """Always refused."""
    raise NotPushed


@router.post("/copy", response_class=Response)
async def copy_model(request: Request, wanted: CopyRequest, caller: AdminCaller) -> Response:
    """Give a model another name, under which it stays even when the first one is deleted. No file is copied."""
    name = ollama_create.new_name(wanted.destination)
    async with registry.connect() as models:
        version = await models.find(wanted.source)
        made = Made(version.files, version.adapter, version.base_model, version.manner, copied=version)
        await ollama_create.serve(models, name, made)
    models_of(request).forget()
    return Response()


@router.delete("/delete", response_class=Response)
async def delete_model(request: Request, wanted: DeleteRequest, caller: CurrentCaller) -> Response:
    """Delete a version (NAME:v3), or a model with all its versions (NAME, NAME:latest): one's own, or any as an
    administrator."""
    await delete(request, wanted.model, caller)
    return Response()


async def _told(request: Request, steps: AsyncGenerator[Status], is_streamed: bool) -> Response:
    # The first step is waited for, because until then an error still has a status.
    first = await while_connected(request, anext(steps))
    if is_streamed:
        return StreamingResponse(_lines(request, first, steps), media_type=NDJSON)
    last = await while_connected(request, _last(first, steps))
    models_of(request).forget()
    return Response(orjson.dumps(last), media_type="application/json")


async def _lines(request: Request, first: Status, steps: AsyncGenerator[Status]) -> AsyncGenerator[bytes]:
    async with aclosing(steps):
        try:
            yield _line(first)
            async for step in steps:
                models_of(request).forget()
                yield _line(step)
        except ForgearrError as error:
            yield _line({"error": as_forgearr_error(error).message})


async def _last(first: Status, steps: AsyncGenerator[Status]) -> Status:
    last = first
    async with aclosing(steps):
        async for step in steps:
            last = step
    return last


def _line(step: Status) -> bytes:
    return orjson.dumps(step) + b"\n"
