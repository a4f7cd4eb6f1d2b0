"""Resolve the data that a spec names (a dataset, a file, prompts or a folder) to a dataset."""

import re
import tempfile
from collections.abc import Iterable
from importlib.resources import files as shipped_files
from pathlib import Path
from typing import Any, Literal

from sqlalchemy.ext.asyncio import AsyncSession

from cluster import identity
from cluster.db import Database, run_with_database
from cluster.errors import Forbidden, InvalidRequest
from cluster.files import store as file_store
from cluster.files.tables import File
from cluster.ownership import Principal
from cluster.settings import get_settings
from pipelines.training.data import documents, prompts
from pipelines.training.data.content import write_samples
from pipelines.training.data.datasets import Dataset, find, logger, store_dataset
from pipelines.training.data.parsing import WrongKindOfData, parse_samples, read_lines, read_samples
from pipelines.training.data.samples import PreferencePair, Sample
from pipelines.training.spec import DataSource, FineTuneSpec

DEMO_DATASET = "demo/homelab"


class FolderForbidden(Forbidden):
    """Only an administrator may read this folder."""

    code = "FOLDER_FORBIDDEN"


class FolderNotFound(InvalidRequest):
    """There is no such folder."""

    code = "FOLDER_NOT_FOUND"


class InvalidTrainingFile(InvalidRequest):
    """This file cannot be used for training."""

    code = "INVALID_TRAINING_FILE"


# For jobs, which run in threads without an event loop.


def resolve(data: DataSource, owner_id: str | None) -> Dataset:
    """The dataset that `data` names: an existing one, or one made now from a file, prompts or documents."""
    return run_with_database(lambda database: _resolve(database, data, owner_id))


# For routes.


async def require_usable(
    session: AsyncSession, data: DataSource, principal: Principal, method: Literal["supervised", "dpo"]
) -> None:
    """Raise the errors of `resolve` and of the training that can be found without reading the data."""
    kind = "chat"  # of prompts and the demo; assumed of folders, which are not read here
    if data.dataset is not None and data.dataset != DEMO_DATASET:
        kind = (await find(session, data.dataset, principal)).kind
    if data.file is not None:
        kind = (await _training_file(session, data.file, principal)).content or kind
    if data.prompts is not None:
        await prompts.find_matching_ids(session, data.prompts, principal)
    if data.folder is not None:
        _require_folder(data.folder, principal)
    if (kind == "preference") != (method == "dpo"):
        expected = "pairs (chosen and rejected)" if method == "dpo" else "chat samples"
        raise WrongKindOfData(f"The method '{method}' learns from {expected}; this data is of the kind '{kind}'.")


def admin_choice(spec: DataSource | FineTuneSpec) -> str | None:
    """The field that names a folder which only administrators may read, if there is one."""
    if isinstance(spec, DataSource):
        folders = {"folder": spec.folder}
    else:
        folders = {
            "data.folder": spec.data.folder,
            "validation.folder": spec.validation and spec.validation.folder,
            "base_model": spec.base_model if is_path(spec.base_model) else None,
        }
    forbidden = [field for field, path in folders.items() if path is not None and not is_shared(path)]
    return f"{forbidden[0]} outside of forge.folders" if forbidden else None


def is_path(reference: str) -> bool:
    """Whether a base model is given as a path on this machine, not as the name of a model."""
    return reference.startswith(("/", "~", "."))


def is_shared(path: str) -> bool:
    """Whether a path, with its links resolved, is in a folder that every account may read."""
    resolved = _resolve_path(path)
    return any(resolved.is_relative_to(root.expanduser().resolve()) for root in get_settings().forge.folders)


async def _resolve(database: Database, data: DataSource, owner_id: str | None) -> Dataset:
    async with database.read_transaction() as session:
        principal = await identity.find_principal(session, owner_id)
        if data.dataset is not None and data.dataset != DEMO_DATASET:
            return await find(session, data.dataset, principal)
        file = await _training_file(session, data.file, principal) if data.file is not None else None
        prompt_samples = (
            await prompts.load_samples(session, data.prompts, principal) if data.prompts is not None else []
        )
    if file is not None:
        with file_store.open_file(file) as content:
            samples = read_samples(read_lines(content), file.filename)
            return await _build_dataset(database, f"file/{_slug(file.filename)}", samples, {"file": file.id}, principal)
    if data.prompts is not None:
        source = {"prompts": data.prompts.model_dump(exclude_defaults=True)}
        return await _build_dataset(database, _prompts_name(data), prompt_samples, source, principal)
    if data.folder is not None:
        folder = _require_folder(data.folder, principal)
        folder_content = documents.read_folder(folder)
        if folder_content.skipped:
            names = ", ".join(folder_content.skipped[:20])
            logger.warning("%s: %d files are not UTF-8 text: %s", folder, len(folder_content.skipped), names)
        source = {
            "folder": documents.printable_path(folder),
            "files": folder_content.files,
            "skipped": len(folder_content.skipped),
        }
        return await _build_dataset(database, f"folder/{_slug(folder.name)}", folder_content.samples, source, principal)
    return await _build_dataset(database, DEMO_DATASET, demo_samples(), {"shipped": DEMO_DATASET}, principal)


def demo_samples() -> list[Sample] | list[PreferencePair]:
    """The samples that come with Forgearr."""
    return parse_samples((shipped_files("configs") / f"{DEMO_DATASET}.jsonl").read_bytes(), DEMO_DATASET)


async def _build_dataset(
    database: Database,
    name: str,
    samples: Iterable[Sample | PreferencePair],
    source: dict[str, Any],
    principal: Principal,
) -> Dataset:
    with tempfile.TemporaryDirectory(prefix="forgearr-dataset-") as folder:
        content = write_samples(samples, Path(folder) / "samples.jsonl", name)
        return await store_dataset(database, name, content, source, principal)


async def _training_file(session: AsyncSession, file_id: str, principal: Principal) -> File:
    file = await file_store.find(session, file_id, principal)
    if file.purpose != "fine-tune":
        raise InvalidTrainingFile(
            f"The file '{file_id}' was uploaded with the purpose '{file.purpose}', not 'fine-tune'."
        )
    if file.fault:
        raise InvalidTrainingFile(f"The file '{file_id}' cannot be used for training: {file.fault}")
    return file


def _require_folder(path: str, principal: Principal) -> Path:
    if not principal.is_admin and not is_shared(path):
        raise FolderForbidden(f"Only an administrator may read {path}: it is not in a folder of forge.folders.")
    folder = _resolve_path(path)
    try:
        if not folder.is_dir():
            raise FolderNotFound(f"There is no folder {path} on this machine.")
    except OSError as error:
        raise FolderNotFound(f"The folder {path} cannot be read: {error.strerror}.") from error
    return folder


def _resolve_path(path: str) -> Path:
    try:
        return Path(path).expanduser().resolve()
    except (OSError, RuntimeError) as error:  # an unknown ~user, links that lead to themselves
        raise FolderNotFound(f"There is no folder {path} on this machine: {error}.") from error


def _prompts_name(data: DataSource) -> str:
    assert data.prompts is not None
    parts = [data.prompts.category or "", *sorted(data.prompts.tags or ())]
    return f"prompts/{_slug('-'.join(word for word in parts if word) or 'chosen')}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-.")[:80] or "unnamed"
