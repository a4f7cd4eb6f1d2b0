"""Models made from blobs, or from other models: what /api/create does, told step by step in Ollama's words."""

import asyncio
import tempfile
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.db import get_database
from cluster.errors import InvalidRequest
from cluster.settings import home
from jobs.execution import isolated
from pipelines.training.export.quantize import FTYPES
from pipelines.training.models import blobs, registry, tiny
from pipelines.training.models import versions as models_versions
from pipelines.training.models.registry import Registry
from pipelines.training.models.versions import File, Manner, Version
from serve.engines.defaults import context_of
from serve.engines.gguf import tiny as gguf_tiny
from serve.engines.model_header import Header, read_fields, read_header
from serve.ollama.model_schemas import CreateRequest
from serve.ollama.templates.chat_template import as_jinja

Status = dict[str, Any]
Describe = Callable[[str], Awaitable[Header]]
"""What the engine says of a model that there is."""

QUANTIZABLE = {"f32", "f16", "bf16", "unknown"}
"""What llama.cpp does quantize; of the last one only it can say."""
GGUF = b"GGUF"


class CannotCreate(InvalidRequest):
    """A model cannot be made of this."""

    code = "CANNOT_CREATE"


@dataclass(frozen=True)
class Made:
    """What a model will be."""

    files: list[File]
    adapter: File | None
    base_model: str
    manner: Manner
    copied: Version | None = None  # it has its files from this one


async def create(wanted: CreateRequest, describe: Describe) -> AsyncGenerator[Status]:
    """Make a model and serve it as NAME:latest. Until the first step is told, nothing has begun."""
    name = new_name(wanted.model)
    template = None if wanted.template is None else as_jinja(wanted.template)
    if wanted.quantize is not None and wanted.quantize.lower() not in FTYPES:
        raise CannotCreate(f"There is no quantization '{wanted.quantize}' here: take one of {', '.join(FTYPES)}.")
    async with registry.connect() as models:
        with tempfile.TemporaryDirectory(prefix="forgearr-create-", dir=home()) as folder:
            if wanted.files is not None:
                found = await _from_file(wanted.files, Manner(), Path(folder))
            else:
                found = await _from_model(models, wanted.from_ or "", Path(folder))
            if wanted.adapters is not None:
                found = await _adapted(wanted.adapters, found, describe, Path(folder))
            manner = wanted.manner(found.manner, template)
            if not found.files and _of_loading(manner) != _of_loading(found.manner):
                raise CannotCreate("An adapter shares template and num_ctx with the model that it is for.")
            yield {"status": "parsing GGUF"}
            if wanted.quantize is not None:
                async for told in _quantized(models, found, wanted.quantize.lower(), Path(folder)):
                    if isinstance(told, Made):
                        found = told
                    else:
                        yield told
        made = Made(found.files, found.adapter, found.base_model, manner, found.copied)
        for file in [*made.files, *([made.adapter] if made.adapter else [])]:
            yield {"status": f"using existing layer sha256:{file.sha256}"}
        yield {"status": "writing manifest"}
        await serve(models, name, made)
    yield {"status": "success"}


def new_name(reference: str) -> str:
    """The name of a model that is to be made; its versions number themselves."""
    try:
        name, number = models_versions.parse(reference)
    except models_versions.ModelNotFound as error:
        raise CannotCreate(
            f"'{reference}' cannot be a model's name: take small letters, digits, dots, dashes and underscores, and no "
            "tag but :latest."
        ) from error
    if number is not None:
        raise CannotCreate(f"'{reference}' names a version; say {name}, and the next version of it is made.")
    return name


async def serve(models: Registry, name: str, made: Made) -> Version:
    """Register it, unless it is what is served already, and serve it as NAME:latest."""
    for file in [*made.files, *([made.adapter] if made.adapter else [])]:
        if made.copied is None or not made.copied.run_id:
            await blobs.touch(get_database(), file.sha256)
    served = await _served(models, name)
    if served is not None and _is_same(served, made):
        return served
    if made.copied is not None:
        version = await models.copy(made.copied, name, made.manner)
    else:
        version = await models.register_blobs(
            name, made.files, made.adapter, base_model=made.base_model, manner=made.manner
        )
    await models.point(name, version.number)
    return version


async def checked_file(path: Path, name: str, sha256: str) -> File:
    """A GGUF file as that of a model, if it is one."""
    header = await asyncio.to_thread(_read, path, name)
    return File(name, header.quantization, sha256, header.file_bytes)


def _read(path: Path, name: str) -> Header:
    with path.open("rb") as file:
        if file.read(4) != GGUF:
            raise CannotCreate(
                f"{name} is not a GGUF file. Models in safetensors are converted by an export of a fine-tune, or by "
                "llama.cpp's convert_hf_to_gguf.py."
            )
    if read_fields(path).get("general.type") == "adapter":
        raise CannotCreate(f"{name} is an adapter: send it as one, with the model that it is for in from.")
    return read_header(path)


async def _from_file(files: dict[str, str], manner: Manner, folder: Path) -> Made:
    if len(files) != 1:
        raise CannotCreate(
            "A model is made of one GGUF file. Turn a folder of safetensors, or a model that is split, into one first "
            "(llama.cpp's convert_hf_to_gguf.py, llama-gguf-split --merge)."
        )
    ((name, digest),) = files.items()
    sha256 = digest[7:]
    await blobs.touch(get_database(), sha256)
    path = await asyncio.to_thread(blobs.local, sha256, folder)
    return Made([await checked_file(path, Path(name).name, sha256)], None, "", manner)


async def _from_model(models: Registry, reference: str, folder: Path) -> Made:
    if reference.removesuffix(":latest") != tiny.NAME:
        version = await models.find(reference)
        return Made(version.files, version.adapter, version.base_model, version.manner, copied=version)
    path = await gguf_tiny.file()
    sha256 = await asyncio.to_thread(blobs.hash_of, path)
    await blobs.take(get_database(), path, sha256)
    return Made([await checked_file(path, path.name, sha256)], None, tiny.NAME, Manner())


async def _adapted(adapters: dict[str, str], base: Made, describe: Describe, folder: Path) -> Made:
    """A model that is an adapter, and stands on another one."""
    if len(adapters) != 1:
        raise CannotCreate("A model has one adapter.")
    if base.copied is not None and not base.copied.files:
        raise CannotCreate(f"{base.copied.reference} is an adapter itself; name the model that it is for.")
    ((name, digest),) = adapters.items()
    sha256 = digest[7:]
    size = await blobs.touch(get_database(), sha256)
    fields = await asyncio.to_thread(read_fields, await asyncio.to_thread(blobs.local, sha256, folder))
    if fields.get("general.type") != "adapter" or fields.get("adapter.type") != "lora":
        raise CannotCreate(f"{name} is no LoRA adapter: its header does not say so.")
    stands_on = base.copied.reference if base.copied is not None else tiny.NAME
    architecture = (await describe(stands_on)).architecture
    if (suits := fields.get("general.architecture")) != architecture:
        raise CannotCreate(f"{name} is for models of the architecture {suits}, and {stands_on} is of {architecture}.")
    return Made([], File(Path(name).name, "lora", sha256, size), stands_on, base.manner)


async def _quantized(models: Registry, made: Made, quantization: str, folder: Path) -> AsyncGenerator[Status | Made]:
    """Each step of it, and at last what it has become."""
    if not made.files:
        raise CannotCreate("An adapter is not quantized.")
    before = made.files[0]
    if before.quantization == quantization:
        yield made
        return
    if before.quantization not in QUANTIZABLE:
        raise CannotCreate(
            f"{before.name} is {before.quantization} already; only models of 16 or 32 bits can be quantized."
        )
    if made.copied is not None:
        source = await models.fetch(made.copied, before)
    else:
        source = await asyncio.to_thread(blobs.local, before.sha256, folder)
    target = folder / f"{Path(before.name).stem}-{quantization}.gguf"
    yield {"status": f"quantizing {before.quantization.upper()} model to {quantization.upper()}"}
    sha256 = await _run_quantizing(source, target, quantization)
    await blobs.take(get_database(), target, sha256)
    yield {"status": "verifying conversion"}
    after = File(target.name, quantization, sha256, target.stat().st_size)
    yield Made([after], None, made.copied.reference if made.copied else made.base_model, made.manner)


async def _run_quantizing(source: Path, target: Path, quantization: str) -> str:
    """In a process of its own, which ends when nobody waits for it any more. Returns the file's SHA-256."""
    given_up = threading.Event()
    working = asyncio.to_thread(
        isolated.run,
        "pipelines.training.export.quantize:finish",
        {
            "source": str(source),
            "files": [{"path": str(target), "quantization": quantization}],
            "adapter": None,
            "threads": 1,
        },
        report=lambda part, doing: None,
        should_stop=given_up.is_set,
        threads=1,
    )
    try:
        (done,) = await working
    finally:
        given_up.set()
    return done["sha256"]


def _of_loading(manner: Manner) -> tuple[str, int | None]:
    return manner.template, context_of(manner)


async def _served(models: Registry, name: str) -> Version | None:
    try:
        return await models.find(name)
    except models_versions.ModelNotFound:
        return None


def _is_same(served: Version, made: Made) -> bool:
    files, adapter, manner = served.files, served.adapter, served.manner
    return (files, adapter, served.base_model, manner) == (made.files, made.adapter, made.base_model, made.manner)
