"""Pulls a model (/api/pull): imports a GGUF file on the server's machine, or has the configured Ollama pull one."""

import asyncio
import hashlib
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

from cluster.db import get_database
from cluster.errors import NotFound
from cluster.settings import get_settings
from pipelines.training.deploy.ollama_push import translate_errors
from pipelines.training.models import blobs, registry, tiny
from pipelines.training.models import versions as models_versions
from pipelines.training.models.versions import ModelDefaults
from serve.engines.ollama.engine import open_client
from serve.ollama import create as ollama_create
from serve.ollama.create import CannotCreate, ModelDraft, Status
from serve.ollama.model_schemas import PullRequest

READ_BYTES = 16 * 1024 * 1024
READ_TIMEOUT_SECONDS = 900
INVALID_NAME_CHARACTERS = re.compile(r"[^a-z0-9._-]+")


class NothingToPull(NotFound):
    """There is no such file on the server's machine."""

    code = "NOTHING_TO_PULL"


async def pull(body: PullRequest) -> AsyncGenerator[Status]:
    if body.model.startswith(("/", "~", "file:")):
        steps = _pull_file(Path(body.model.removeprefix("file://").removeprefix("file:")))
    elif await _is_available(body.model):
        steps = _already_present()
    else:
        steps = _pull_from_ollama(body)
    async with aclosing(steps):
        async for step in steps:
            yield step


async def _already_present() -> AsyncGenerator[Status]:
    yield {"status": "pulling manifest"}
    yield {"status": "success"}


async def _is_available(reference: str) -> bool:
    if reference.removesuffix(":latest") == tiny.NAME:
        return True
    if not get_settings().mlflow.enabled:
        return False
    try:
        async with registry.connect() as models:
            await models.find(reference)
    except models_versions.ModelNotFound:
        return False
    return True


async def _pull_file(path: Path) -> AsyncGenerator[Status]:
    """The name of the file becomes that of the model: /models/Qwen3-4B.Q4_K_M.gguf is qwen3-4b.q4_k_m."""
    path = await asyncio.to_thread(path.expanduser)
    if not await asyncio.to_thread(path.is_file):
        raise NothingToPull(f"There is no file {path} on the machine of this server.")
    name = INVALID_NAME_CHARACTERS.sub("-", path.stem.lower()).strip("-._")[:100]
    if not name:
        raise CannotCreate(f"The name of the file {path.name} cannot become the name of a model.")
    gguf_file = await ollama_create.inspect_gguf(path, path.name, "")
    yield {"status": "pulling manifest"}
    total = gguf_file.bytes
    digest = hashlib.sha256()
    with path.open("rb") as content:
        completed = 0
        while piece := await asyncio.to_thread(content.read, READ_BYTES):
            await asyncio.to_thread(digest.update, piece)
            completed += len(piece)
            yield {"status": "verifying sha256 digest", "total": total, "completed": completed}
    sha256 = digest.hexdigest()
    layer_fields: Status = {"status": f"pulling {sha256[:12]}", "digest": f"sha256:{sha256}", "total": total}
    try:
        await blobs.touch(get_database(), sha256)
    except blobs.BlobNotFound:
        async for step in _store_blob(path, sha256, layer_fields):
            yield step
    yield {**layer_fields, "completed": total}
    yield {"status": "writing manifest"}
    async with registry.connect() as models:
        file = models_versions.ModelFile(gguf_file.name, gguf_file.quantization, sha256, total)
        await ollama_create.register_and_serve(models, name, ModelDraft([file], None, "", ModelDefaults()))
    yield {"status": "success"}


async def _store_blob(path: Path, sha256: str, layer_fields: Status) -> AsyncGenerator[Status]:
    """Copy a file to storage. Yields the progress."""
    progress = asyncio.Queue[int | None]()
    task = asyncio.ensure_future(blobs.add_file(get_database(), path, sha256, progress.put_nowait))
    task.add_done_callback(lambda _: progress.put_nowait(None))
    try:
        while (completed := await progress.get()) is not None:
            yield {**layer_fields, "completed": completed}
        await task
    finally:
        task.cancel()


async def _pull_from_ollama(body: PullRequest) -> AsyncGenerator[Status]:
    """The server pulls the model for itself. Requests can then name the model here, too."""
    url = get_settings().ollama.url
    if url is None:
        raise NothingToPull(
            f"There is no model '{body.model}', and no Ollama server that could pull it is configured (ollama.url). "
            "To import a GGUF file on the machine of this server, send its path."
        )
    with translate_errors(url):
        async with open_client(url, READ_TIMEOUT_SECONDS) as client:
            steps = await client.pull(body.model, insecure=bool(body.insecure), stream=True)
            async for step in steps:
                yield step.model_dump(exclude_none=True)
