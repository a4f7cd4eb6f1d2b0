"""The routes of Ollama's API that create, copy, pull and delete models."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from cluster.errors import ForgearrError
from pipelines.training.models import registry
from serve.engines.model_header import Header
from serve.http.disconnect import cancel_on_disconnect
from serve.http.error_handlers import as_forgearr_error
from serve.models.dependencies import get_engine, get_models
from serve.models.names import delete_and_unload
from serve.ollama import create as ollama_create
from serve.ollama import pull as ollama_pull
from serve.ollama.create import ModelDraft, Status
from serve.ollama.model_schemas import (
    PROGRESS_RESPONSES,
    CopyRequest,
    CreateRequest,
    DeleteRequest,
    Progress,
    PullRequest,
    PushRequest,
)
from serve.security.callers import AdminCaller, CurrentCaller

router = APIRouter(prefix="/api")

NDJSON = "application/x-ndjson"


class PushNotSupported(ForgearrError):
    """Models cannot be pushed to a registry. A deployment can copy a model to an Ollama server."""

    status = 501
    error = "not_implemented"
    code = "PUSH_NOT_SUPPORTED"


@router.post("/create", response_model=Progress, responses=PROGRESS_RESPONSES)
async def create_model(request: Request, body: CreateRequest, caller: AdminCaller) -> Any:
    """Create a model from a GGUF file, another model or an adapter, and serve it as NAME:latest."""

    async def describe(reference: str) -> Header:
        model = await get_models(request).resolve(reference, caller)
        return await get_engine(request).describe(model.reference, model.source)

    return await _progress_response(request, ollama_create.create(body, describe), body.is_streamed)


@router.post("/pull", response_model=Progress, responses=PROGRESS_RESPONSES)
async def pull_model(request: Request, body: PullRequest, caller: AdminCaller) -> Any:
    """Import a GGUF file on the server's machine by its path, or have the configured Ollama server pull a model."""
    return await _progress_response(request, ollama_pull.pull(body), body.is_streamed)


@router.post("/push", responses={501: {"description": "Not supported"}})
async def push_model(body: PushRequest, caller: AdminCaller) -> Progress:
    """Not supported."""
    raise PushNotSupported


@router.post("/copy", response_class=Response)
async def copy_model(request: Request, body: CopyRequest, caller: AdminCaller) -> Response:
    """Copy a model to another name. The copy is independent of the original, but shares its files."""
    name = ollama_create.validate_name(body.destination)
    async with registry.connect() as models:
        version = await models.find(body.source)
        draft = ModelDraft(version.files, version.adapter, version.base_model, version.defaults, copied_from=version)
        await ollama_create.register_and_serve(models, name, draft)
    get_models(request).clear_cache()
    return Response()


@router.delete("/delete", response_class=Response)
async def delete_model(request: Request, body: DeleteRequest, caller: CurrentCaller) -> Response:
    """Delete a version (NAME:v3), or a model with all its versions (NAME, NAME:latest).

    What is served is deleted by nobody. Administrators may delete everything else, others what is theirs.
    """
    await delete_and_unload(request, body.model, caller)
    return Response()


async def _progress_response(request: Request, steps: AsyncGenerator[Status], is_streamed: bool) -> Response:
    # Until the first step arrives, an error can still set the status.
    first = await cancel_on_disconnect(request, anext(steps))
    if is_streamed:
        return StreamingResponse(_stream_lines(request, first, steps), media_type=NDJSON)
    last = await cancel_on_disconnect(request, _last_step(first, steps))
    get_models(request).clear_cache()
    return Response(orjson.dumps(last), media_type="application/json")


async def _stream_lines(request: Request, first: Status, steps: AsyncGenerator[Status]) -> AsyncGenerator[bytes]:
    async with aclosing(steps):
        try:
            yield _json_line(first)
            async for step in steps:
                get_models(request).clear_cache()
                yield _json_line(step)
        except ForgearrError as error:
            yield _json_line({"error": as_forgearr_error(error).message})


async def _last_step(first: Status, steps: AsyncGenerator[Status]) -> Status:
    last = first
    async with aclosing(steps):
        async for step in steps:
            last = step
    return last


def _json_line(step: Status) -> bytes:
    return orjson.dumps(step) + b"\n"
