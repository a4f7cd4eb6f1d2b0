"""From the name of a dataset to its content."""

import asyncio
import re
import tempfile
from collections.abc import Iterable
from importlib.resources import files as shipped_files
from pathlib import Path
from typing import Any, Literal

from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import Database, apart
from cluster.errors import Forbidden, InvalidRequest
from cluster.files import store as file_store
from cluster.files.store import File
from cluster.ownership import Owner
from cluster.settings import get_settings
from pipelines.training.data import documents, prompts
from pipelines.training.data.content import write
from pipelines.training.data.datasets import Dataset, find, keep, logger, owner_with_id
from pipelines.training.data.parsing import WrongKindOfData, lines_of, parse, read
from pipelines.training.data.samples import Pair, Sample
from pipelines.training.spec import Data, FineTuneSpec

SHIPPED = "demo/homelab"


class FolderForbidden(Forbidden):
    """Only an administrator may read this folder."""

    code = "FOLDER_FORBIDDEN"


class FolderNotFound(InvalidRequest):
    """There is no such folder."""

    code = "FOLDER_NOT_FOUND"


class NotToLearnFrom(InvalidRequest):
    """This file is not one to learn from."""

    code = "INVALID_TRAINING_FILE"


# For jobs, which run in threads without an event loop.


def resolve(data: Data, owner_id: str | None) -> Dataset:
    """The dataset that is meant: found, or made from prompts or documents as they are now."""
    return asyncio.run(apart(lambda database: _resolve(database, data, owner_id)))


# For doors.


async def check(session: AsyncSession, data: Data, owner: Owner, method: Literal["supervised", "dpo"]) -> None:
    """Raise what `resolve` and the training would, as far as that can be said without reading the data."""
    kind = "chat"  # whatever is no uploaded dataset
    if data.dataset is not None and data.dataset != SHIPPED:
        kind = (await find(session, data.dataset, owner)).kind
    if data.file is not None:
        kind = (await _training_file(session, data.file, owner)).content or kind
    if data.prompts is not None:
        await prompts.matching(session, data.prompts, owner)
    if data.folder is not None:
        _permitted(data.folder, owner)
    if (kind == "preference") != (method == "dpo"):
        wanted = "pairs (chosen and rejected)" if method == "dpo" else "chat samples"
        raise WrongKindOfData(f"The method '{method}' learns from {wanted}; this data is of the kind '{kind}'.")


def needs_admin(spec: Data | FineTuneSpec) -> bool:
    """Whether it names a folder of this machine that is not for everybody."""
    sources = [spec] if isinstance(spec, Data) else [spec.data, *([spec.validation] if spec.validation else [])]
    named = [data.folder for data in sources if data.folder is not None]
    if isinstance(spec, FineTuneSpec) and is_path(spec.base_model):
        named.append(spec.base_model)
    return not all(is_shared(path) for path in named)


def is_path(reference: str) -> bool:
    """Whether a base model is named by a place on this machine, and not by the name of a model."""
    return reference.startswith(("/", "~", "."))


def is_shared(path: str) -> bool:
    """Whether it lies in a folder that is for everybody, wherever its links lead."""
    place = _place(path)
    return any(place.is_relative_to(root.expanduser().resolve()) for root in get_settings().forge.folders)


async def _resolve(database: Database, data: Data, owner_id: str | None) -> Dataset:
    async with database.reading() as session:
        owner = await owner_with_id(session, owner_id)
        if data.dataset is not None and data.dataset != SHIPPED:
            return await find(session, data.dataset, owner)
        file = await _training_file(session, data.file, owner) if data.file is not None else None
        chosen = await prompts.samples(session, data.prompts, owner) if data.prompts is not None else []
    if file is not None:
        with file_store.opened(file) as content:
            samples = read(lines_of(content), file.filename)
            return await _make(database, f"file/{_slug(file.filename)}", samples, {"file": file.id}, owner)
    if data.prompts is not None:
        source = {"prompts": data.prompts.model_dump(exclude_none=True)}
        return await _make(database, _prompts_name(data), chosen, source, owner)
    if data.folder is not None:
        folder = _permitted(data.folder, owner)
        reading = documents.read_folder(folder)
        if reading.skipped:
            named = ", ".join(reading.skipped[:20])
            logger.warning("%s: %d files are no text in UTF-8: %s", folder, len(reading.skipped), named)
        source = {"folder": documents.shown(folder), "files": reading.files, "skipped": len(reading.skipped)}
        return await _make(database, f"folder/{_slug(folder.name)}", reading.samples, source, owner)
    return await _make(database, SHIPPED, shipped(), {"shipped": SHIPPED}, owner)


def shipped() -> list[Sample] | list[Pair]:
    """The samples that come with Forgearr."""
    return parse((shipped_files("configs") / f"{SHIPPED}.jsonl").read_bytes(), SHIPPED)


async def _make(
    database: Database, name: str, samples: Iterable[Sample | Pair], source: dict[str, Any], owner: Owner
) -> Dataset:
    with tempfile.TemporaryDirectory(prefix="forgearr-dataset-") as folder:
        content = write(samples, Path(folder) / "samples.jsonl", name)
        return await keep(database, name, content, source, owner)


async def _training_file(session: AsyncSession, file_id: str, owner: Owner) -> File:
    file = await file_store.find(session, file_id, owner)
    if file.purpose != "fine-tune":
        raise NotToLearnFrom(f"The file '{file_id}' was uploaded with the purpose '{file.purpose}', not 'fine-tune'.")
    if file.fault:
        raise NotToLearnFrom(f"The file '{file_id}' cannot be learned from: {file.fault}")
    return file


def _permitted(path: str, owner: Owner) -> Path:
    if not owner.is_admin and not is_shared(path):
        raise FolderForbidden(f"Only an administrator may read {path}: it is not in a folder of forge.folders.")
    folder = _place(path)
    try:
        if not folder.is_dir():
            raise FolderNotFound(f"There is no folder {path} on this machine.")
    except OSError as error:
        raise FolderNotFound(f"The folder {path} cannot be read: {error.strerror}.") from error
    return folder


def _place(path: str) -> Path:
    try:
        return Path(path).expanduser().resolve()
    except (OSError, RuntimeError) as error:  # an unknown ~user, links that lead to themselves
        raise FolderNotFound(f"There is no folder {path} on this machine: {error}.") from error


def _prompts_name(data: Data) -> str:
    assert data.prompts is not None
    said = [data.prompts.category or "", *sorted(data.prompts.tags or ())]
    return f"prompts/{_slug('-'.join(word for word in said if word) or 'chosen')}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-.")[:80] or "unnamed"
