"""Resolve the name of a base model to a folder on this machine. The model is built, fetched or downloaded if needed."""

import asyncio
import errno
import os
import tempfile
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from cluster import durable, storage
from cluster.errors import NotFound
from cluster.files import disk
from cluster.settings import get_settings, home
from jobs import outputs
from jobs.execution import isolated
from pipelines.training.models import access, chat_template, merge, registry, tiny
from pipelines.training.models import versions as models_versions

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
LOGIN_HINT = (
    " HF_TOKEN was not used: it is for administrators' jobs, and for repositories in forge.hub_token_repositories."
)
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


class BaseModelNotFound(NotFound):
    """There is no such base model."""

    code = "BASE_MODEL_NOT_FOUND"


def resolve(reference: str, owner_id: str | None = None) -> str:
    """The folder of a base model on this machine, in the format of transformers.

    `owner_id` is the account that trains with it. None: the platform.

    forgearr/tiny is built here. NAME:v3 and NAME:latest are the trained model that the version was exported from. A
    path is a folder. Anything else is a model of the Hugging Face hub.
    """
    if reference == tiny.NAME:
        return str(tiny.model_folder())
    if reference.startswith(("/", "~", ".")):
        folder = _local_folder(reference)
    elif ":" in reference:
        folder = _registered_folder(reference, owner_id)
    else:
        folder = _download_from_hub(reference, may_use_token=_may_use_token(reference, owner_id))
    chat_template.check_folder(Path(folder), reference)
    return folder


def pin_reference(reference: str, owner_id: str | None) -> str:
    """Replace NAME:latest by NAME:v3, which always refers to the same version. Other references stay unchanged.

    The version must be visible to the account `owner_id`. None: the platform, which may see all.
    """
    if reference.startswith(("/", "~", ".")) or ":" not in reference:
        return reference
    version = asyncio.run(_find_version(reference))
    return access.require_visible(version, outputs.find_owner(owner_id), reference).reference


def is_adapter(model: Path) -> bool:
    return (model / "adapter_config.json").exists()


def _local_folder(reference: str) -> str:
    folder = Path(reference).expanduser()
    missing = [] if (folder / "config.json").exists() else ["config.json"]
    if not any(file for pattern in WEIGHTS for file in folder.glob(pattern)):
        missing.append("*.safetensors")
    if missing:
        raise BaseModelNotFound(
            f"There is no model in the folder {folder}: it has no {' and no '.join(missing)}."
            if folder.is_dir()
            else f"There is no base model '{reference}': {folder} is not a folder on this machine."
        )
    return str(folder)


def _registered_folder(reference: str, owner_id: str | None) -> str:
    """The trained model that a version was exported from. An adapter is merged into its base, and that is cached."""
    version = asyncio.run(_find_version(reference))
    if not version.job_id:
        raise BaseModelNotFound(
            f"{reference} was made from GGUF files, which cannot be trained: name the model that they were made from."
        )
    result = outputs.get_output(version.job_id, "fine_tune", None).result
    cache = home() / "cache" / "bases"
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / version.job_id
    if target.exists():
        return str(target)
    with tempfile.TemporaryDirectory(prefix=f"{version.job_id}.", dir=cache) as work:
        model = fetch(result["model"], Path(work), reference)
        if not is_adapter(model):
            if not model.is_relative_to(work):
                return str(model)
            ready = model
        else:
            ready = Path(work) / "merged"
            isolated.run_isolated(
                merge.merge_only,
                {"base": resolve(result["base_model"], owner_id), "adapter": str(model), "target": str(ready)},
                report=lambda fraction, phase: None,
                should_stop=lambda: False,
                threads=int(os.environ.get("OMP_NUM_THREADS", "1")),
            )
        try:
            durable.publish(ready, target)
        except OSError as error:
            if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:  # another process was faster
                raise
    return str(target)


def fetch(address: str, work: Path, name: str) -> Path:
    """A local copy of the trained model that a fine-tune has stored. `name` names its origin in errors."""
    try:
        folder = storage.fetch(address, work)
    except FileNotFoundError as error:
        raise BaseModelNotFound(f"The model of {name} is no longer in storage: {address} is missing.") from error
    chat_template.check_folder(folder, name)
    return folder


async def _find_version(reference: str) -> models_versions.Version:
    async with registry.connect() as models:
        return await models.find(reference)


def _may_use_token(repository: str, owner_id: str | None) -> bool:
    """Whether HF_TOKEN, which is the operator's, opens this repository for the account."""
    patterns = get_settings().forge.hub_token_repositories
    is_open = owner_id is None or any(fnmatchcase(repository, pattern) for pattern in patterns)
    return is_open or outputs.is_admin(owner_id)


def _download_from_hub(reference: str, *, may_use_token: bool) -> str:
    import httpx
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import (
        DryRunError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)
    token = None if may_use_token else False  # None: HF_TOKEN
    try:
        with suppress(httpx.TransportError, OfflineModeIsEnabled):
            if not may_use_token:  # what somebody else has downloaded is in the cache, whoever may see it
                HfApi().auth_check(reference, token=False)
        with suppress(DryRunError):  # offline
            files = snapshot_download(reference, allow_patterns=HUB_FILES, token=token, dry_run=True)
            needed_bytes = sum(file.file_size or 0 for file in files if file.will_download)
            disk.require_space(Path(HF_HUB_CACHE), needed_bytes, f"The base model '{reference}'")
        return _require_weights(snapshot_download(reference, allow_patterns=HUB_FILES, token=token), reference)
    except HFValidationError as error:
        raise BaseModelNotFound(
            f"There is no base model '{reference}': it is neither forgearr/tiny, a folder (/path), a version "
            "(NAME:v3), nor an id of the Hugging Face hub (owner/name)."
        ) from error
    except GatedRepoError as error:
        raise BaseModelNotFound(
            f"The model '{reference}' of the Hugging Face hub is gated: accept its terms there, and set HF_TOKEN where "
            f"Forgearr runs.{'' if may_use_token else LOGIN_HINT}"
        ) from error
    except RepositoryNotFoundError as error:
        raise BaseModelNotFound(
            f"There is no base model '{reference}' on the Hugging Face hub, or it is private, and HF_TOKEN is not set."
            f"{'' if may_use_token else LOGIN_HINT}"
        ) from error
    except (OSError, httpx.HTTPError, HfHubHTTPError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        raise BaseModelNotFound(
            f"The base model '{reference}' is not on this machine, and could not be downloaded from the Hugging Face "
            f"hub: {_first_line(error)}. Offline, use a local folder, a registered version or forgearr/tiny."
        ) from error


def _require_weights(folder: str, reference: str) -> str:
    if not any(file for pattern in WEIGHTS for file in Path(folder).glob(pattern)):
        raise BaseModelNotFound(f"The model '{reference}' of the Hugging Face hub has no weights as safetensors.")
    return folder


def _first_line(error: Any) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
