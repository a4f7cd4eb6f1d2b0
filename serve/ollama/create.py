"""Creates models from blobs or other models (/api/create), and reports the progress in Ollama's format."""

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
from pipelines.training.export.quantize import LLAMA_FTYPES, finish
from pipelines.training.models import blobs, registry, tiny
from pipelines.training.models import versions as models_versions
from pipelines.training.models.chat_template import check_chat_template
from pipelines.training.models.registry import Registry
from pipelines.training.models.versions import ModelDefaults, ModelFile, Version
from serve.engines.defaults import context_limit
from serve.engines.gguf import tiny as gguf_tiny
from serve.engines.model_header import Header, read_fields, read_header
from serve.ollama.model_schemas import CreateRequest
from serve.ollama.templates.chat_template import to_jinja

Status = dict[str, Any]
Describe = Callable[[str], Awaitable[Header]]
"""Returns the header of an existing model."""

QUANTIZABLE = {"f32", "f16", "bf16", "unknown"}
"""Types that llama.cpp can quantize. If the type is unknown, only llama.cpp can tell."""
GGUF_MAGIC = b"GGUF"


class CannotCreate(InvalidRequest):
    """No model can be created from this."""

    code = "CANNOT_CREATE"


@dataclass(frozen=True)
class ModelDraft:
    """A model before its registration."""

    files: list[ModelFile]
    adapter: ModelFile | None
    base_model: str
    defaults: ModelDefaults
    copied_from: Version | None = None  # the version whose files it has


async def create(body: CreateRequest, describe: Describe) -> AsyncGenerator[Status]:
    """Create a model, and serve it as NAME:latest. The request is validated before the first status."""
    name = validate_name(body.model)
    template = None if body.template is None else to_jinja(body.template)
    if body.quantize is not None and body.quantize.lower() not in LLAMA_FTYPES:
        raise CannotCreate(f"There is no quantization '{body.quantize}'. There are: {', '.join(LLAMA_FTYPES)}.")
    await asyncio.to_thread(check_chat_template, template or "", name)
    async with registry.connect() as models:
        with tempfile.TemporaryDirectory(prefix="forgearr-create-", dir=home()) as folder:
            if body.files is not None:
                base = await _from_file(body.files, ModelDefaults(), Path(folder))
            else:
                base = await _from_model(models, body.from_ or "", Path(folder))
            if body.adapters is not None:
                base = await _with_adapter(body.adapters, base, describe, Path(folder))
            defaults = body.merge_defaults(base.defaults, template)
            if not base.files and _load_settings(defaults) != _load_settings(base.defaults):
                raise CannotCreate("An adapter has the template and num_ctx of its base model, not its own.")
            yield {"status": "parsing GGUF"}
            if body.quantize is not None:
                async for update in _quantize(models, base, body.quantize.lower(), Path(folder)):
                    if isinstance(update, ModelDraft):
                        base = update
                    else:
                        yield update
        draft = ModelDraft(base.files, base.adapter, base.base_model, defaults, base.copied_from)
        for file in [*draft.files, *([draft.adapter] if draft.adapter else [])]:
            yield {"status": f"using existing layer sha256:{file.sha256}"}
        yield {"status": "writing manifest"}
        await register_and_serve(models, name, draft)
    yield {"status": "success"}


def validate_name(reference: str) -> str:
    """Parse the name of a model to create. Versions are numbered automatically."""
    try:
        name, number = models_versions.parse_reference(reference)
    except models_versions.ModelNotFound as error:
        raise CannotCreate(
            f"'{reference}' is not a valid name for a model. Use lower-case letters, digits, dots, dashes and "
            "underscores, and no tag except :latest."
        ) from error
    if number is not None:
        raise CannotCreate(f"'{reference}' names a version. Use {name}, which creates its next version.")
    return name


async def register_and_serve(models: Registry, name: str, draft: ModelDraft) -> Version:
    """Register the model, unless the served version is the same, and serve it as NAME:latest."""
    for file in [*draft.files, *([draft.adapter] if draft.adapter else [])]:
        if draft.copied_from is None or not draft.copied_from.run_id:
            await blobs.touch(get_database(), file.sha256)
    current = await _find_served(models, name)
    if current is not None and _is_unchanged(current, draft):
        return current
    if draft.copied_from is not None:
        version = await models.copy(draft.copied_from, name, draft.defaults)
    else:
        version = await models.register_blobs(
            name, draft.files, draft.adapter, base_model=draft.base_model, defaults=draft.defaults
        )
    await models.set_served(name, version.number)
    return version


async def inspect_gguf(path: Path, name: str, sha256: str) -> ModelFile:
    """Describe the GGUF file of a model. Any other file is an error."""
    header = await asyncio.to_thread(_read_gguf_header, path, name)
    for template in (header.template, header.tool_template):
        await asyncio.to_thread(check_chat_template, template, name)
    return ModelFile(name, header.quantization, sha256, header.file_bytes)


def _read_gguf_header(path: Path, name: str) -> Header:
    with path.open("rb") as file:
        if file.read(4) != GGUF_MAGIC:
            raise CannotCreate(
                f"{name} is not a GGUF file. An export job converts a fine-tuned model; llama.cpp's "
                "convert_hf_to_gguf.py converts other safetensors."
            )
    if read_fields(path).get("general.type") == "adapter":
        raise CannotCreate(f"{name} is an adapter. Send it in adapters, and its base model in from.")
    return read_header(path)


async def _from_file(files: dict[str, str], defaults: ModelDefaults, folder: Path) -> ModelDraft:
    if len(files) != 1:
        raise CannotCreate(
            "A model has one GGUF file. Convert a folder of safetensors, or merge a split model, first (llama.cpp's "
            "convert_hf_to_gguf.py, llama-gguf-split --merge)."
        )
    ((name, digest),) = files.items()
    sha256 = digest[7:]
    await blobs.touch(get_database(), sha256)
    path = await asyncio.to_thread(blobs.local_path, sha256, folder)
    return ModelDraft([await inspect_gguf(path, Path(name).name, sha256)], None, "", defaults)


async def _from_model(models: Registry, reference: str, folder: Path) -> ModelDraft:
    if reference.removesuffix(":latest") != tiny.NAME:
        version = await models.find(reference)
        return ModelDraft(version.files, version.adapter, version.base_model, version.defaults, copied_from=version)
    path = await gguf_tiny.ensure_file()
    sha256 = await asyncio.to_thread(blobs.sha256_of, path)
    await blobs.add_file(get_database(), path, sha256)
    return ModelDraft([await inspect_gguf(path, path.name, sha256)], None, tiny.NAME, ModelDefaults())


async def _with_adapter(adapters: dict[str, str], base: ModelDraft, describe: Describe, folder: Path) -> ModelDraft:
    """The draft of an adapter for a base model."""
    if len(adapters) != 1:
        raise CannotCreate("A model can have one adapter only.")
    if base.copied_from is not None and not base.copied_from.files:
        raise CannotCreate(f"{base.copied_from.reference} is an adapter itself. Name its base model.")
    ((name, digest),) = adapters.items()
    sha256 = digest[7:]
    size = await blobs.touch(get_database(), sha256)
    fields = await asyncio.to_thread(read_fields, await asyncio.to_thread(blobs.local_path, sha256, folder))
    if fields.get("general.type") != "adapter" or fields.get("adapter.type") != "lora":
        raise CannotCreate(f"{name} is not a LoRA adapter, according to its header.")
    base_reference = base.copied_from.reference if base.copied_from is not None else tiny.NAME
    architecture = (await describe(base_reference)).architecture
    if (adapter_architecture := fields.get("general.architecture")) != architecture:
        raise CannotCreate(
            f"{name} needs a model of the architecture {adapter_architecture}; {base_reference} has {architecture}."
        )
    return ModelDraft([], ModelFile(Path(name).name, "lora", sha256, size), base_reference, base.defaults)


async def _quantize(
    models: Registry, draft: ModelDraft, quantization: str, folder: Path
) -> AsyncGenerator[Status | ModelDraft]:
    """Quantize the file of a draft. Yields the progress, and at the end the new draft."""
    if not draft.files:
        raise CannotCreate("An adapter cannot be quantized.")
    source_file = draft.files[0]
    if source_file.quantization == quantization:
        yield draft
        return
    if source_file.quantization not in QUANTIZABLE:
        raise CannotCreate(
            f"{source_file.name} is {source_file.quantization} already; only models of 16 or 32 bits can be quantized."
        )
    if draft.copied_from is not None:
        source = await models.fetch(draft.copied_from, source_file)
    else:
        source = await asyncio.to_thread(blobs.local_path, source_file.sha256, folder)
    target = folder / f"{Path(source_file.name).stem}-{quantization}.gguf"
    yield {"status": f"quantizing {source_file.quantization.upper()} model to {quantization.upper()}"}
    sha256 = await _run_quantization(source, target, quantization)
    await blobs.add_file(get_database(), target, sha256)
    yield {"status": "verifying conversion"}
    quantized_file = ModelFile(target.name, quantization, sha256, target.stat().st_size)
    yield ModelDraft(
        [quantized_file], None, draft.copied_from.reference if draft.copied_from else draft.base_model, draft.defaults
    )


async def _run_quantization(source: Path, target: Path, quantization: str) -> str:
    """Quantize in a process of its own, which ends if this call is cancelled. Returns the SHA-256 of the file."""
    cancelled = threading.Event()
    task = asyncio.to_thread(
        isolated.run_isolated,
        finish,
        {
            "source": str(source),
            "files": [{"path": str(target), "quantization": quantization}],
            "adapter": None,
            "threads": 1,
        },
        report=lambda progress, message: None,
        should_stop=cancelled.is_set,
        threads=1,
    )
    try:
        (done,) = await task
    finally:
        cancelled.set()
    return done["sha256"]


def _load_settings(defaults: ModelDefaults) -> tuple[str, int | None]:
    return defaults.template, context_limit(defaults)


async def _find_served(models: Registry, name: str) -> Version | None:
    try:
        return await models.find(name)
    except models_versions.ModelNotFound:
        return None


def _is_unchanged(served: Version, draft: ModelDraft) -> bool:
    files, adapter, defaults = served.files, served.adapter, served.defaults
    return (files, adapter, served.base_model, defaults) == (
        draft.files,
        draft.adapter,
        draft.base_model,
        draft.defaults,
    )
