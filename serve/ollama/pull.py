"""What /api/pull does: a GGUF file of the server's machine becomes a model, or the configured Ollama pulls one."""

import asyncio
import hashlib
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

from cluster.db import get_database
from cluster.errors import NotFound
from cluster.settings import get_settings
from pipelines.training.deploy.ollama_push import translated_errors
from pipelines.training.models import blobs, registry, tiny
from pipelines.training.models import versions as models_versions
from pipelines.training.models.versions import Manner
from serve.ollama import create as ollama_create
from serve.ollama.create import CannotCreate, Made, Status
from serve.ollama.model_schemas import PullRequest

READ_BYTES = 16 * 1024 * 1024
SILENCE_SECONDS = 900
NOT_IN_NAMES = re.compile(r"[^a-z0-9._-]+")


class NothingToPull(NotFound):
    """There is no such file on the server's machine."""

    code = "NOTHING_TO_PULL"


async def pull(wanted: PullRequest) -> AsyncGenerator[Status]:
    if wanted.model.startswith(("/", "~", "file:")):
        steps = _of_file(Path(wanted.model.removeprefix("file://").removeprefix("file:")))
    elif await _is_here(wanted.model):
        steps = _nothing()
    else:
        steps = _of_ollama(wanted)
    async with aclosing(steps):
        async for step in steps:
            yield step


async def _nothing() -> AsyncGenerator[Status]:
    yield {"status": "pulling manifest"}
    yield {"status": "success"}


async def _is_here(reference: str) -> bool:
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


async def _of_file(path: Path) -> AsyncGenerator[Status]:
    """Named after the file: /models/Qwen3-4B.Q4_K_M.gguf becomes qwen3-4b.q4_k_m."""
    path = await asyncio.to_thread(path.expanduser)
    if not await asyncio.to_thread(path.is_file):
        raise NothingToPull(f"There is no file {path} on the machine of this server.")
    name = NOT_IN_NAMES.sub("-", path.stem.lower()).strip("-._")[:100]
    if not name:
        raise CannotCreate(f"{path.name} gives no name for a model.")
    checked = await ollama_create.checked_file(path, path.name, "")
    yield {"status": "pulling manifest"}
    total = checked.bytes
    digest = hashlib.sha256()
    with path.open("rb") as content:
        passed = 0
        while piece := await asyncio.to_thread(content.read, READ_BYTES):
            await asyncio.to_thread(digest.update, piece)
            passed += len(piece)
            yield {"status": "verifying sha256 digest", "total": total, "completed": passed}
    sha256 = digest.hexdigest()
    heading: Status = {"status": f"pulling {sha256[:12]}", "digest": f"sha256:{sha256}", "total": total}
    try:
        await blobs.touch(get_database(), sha256)
    except blobs.BlobNotFound:
        async for step in _taken(path, sha256, heading):
            yield step
    yield {**heading, "completed": total}
    yield {"status": "writing manifest"}
    async with registry.connect() as models:
        file = models_versions.File(checked.name, checked.quantization, sha256, total)
        await ollama_create.serve(models, name, Made([file], None, "", Manner()))
    yield {"status": "success"}


async def _taken(path: Path, sha256: str, heading: Status) -> AsyncGenerator[Status]:
    """Each piece of a file that is on its way into storage."""
    arrived = asyncio.Queue[int | None]()
    taking = asyncio.ensure_future(blobs.take(get_database(), path, sha256, arrived.put_nowait))
    taking.add_done_callback(lambda _: arrived.put_nowait(None))
    try:
        while (passed := await arrived.get()) is not None:
            yield {**heading, "completed": passed}
        await taking
    finally:
        taking.cancel()


async def _of_ollama(wanted: PullRequest) -> AsyncGenerator[Status]:
    """It pulls for itself; what it has then can be asked here by the same name."""
    url = get_settings().ollama.url
    if url is None:
        raise NothingToPull(
            f"There is no model '{wanted.model}' here, and no Ollama that could pull it is configured (ollama.url). A "
            "GGUF file on the machine of this server is pulled by its path."
        )
    import httpx
    import ollama

    timeout = httpx.Timeout(SILENCE_SECONDS, connect=10)
    with translated_errors(url):
        async with ollama.AsyncClient(host=url, timeout=timeout) as client:
            steps = await client.pull(wanted.model, insecure=bool(wanted.insecure), stream=True)
            async for step in steps:
                yield step.model_dump(exclude_none=True)
