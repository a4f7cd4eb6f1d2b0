"""Translates a request of OpenAI's fine-tuning API into the spec of a forge job."""

import re
from typing import Any

from fastapi import Request

from cluster.errors import InvalidRequest
from cluster.ownership import Principal
from pipelines.training import presets
from pipelines.training.data import resolution
from pipelines.training.models import tiny
from pipelines.training.models.versions import ModelNotFound
from pipelines.training.spec import FineTuneSpec
from serve.engines.protocol import ModelFolder
from serve.models import fine_tuned_names
from serve.models.dependencies import get_models
from serve.openai.fine_tuning.schemas import (
    DpoHyperparameters,
    FineTuningJobRequest,
)

MAX_CHECKPOINTS = 3
"""As in OpenAI's API."""
DEFAULT_LEARNING_RATE: float = FineTuneSpec.model_fields["learning_rate"].default
DATA_ERROR_CODES = {
    "empty_data",
    "file_not_found",
    "invalid_sample",
    "invalid_training_file",
    "nothing_to_train",
    "sample_too_long",
    "wrong_kind_of_data",
}
"""Errors that the training file causes."""


class MethodNotAvailable(InvalidRequest):
    """The methods are supervised and dpo; reinforcement is not available."""

    code = "METHOD_NOT_AVAILABLE"


class NotABaseModel(InvalidRequest):
    """This model cannot be fine-tuned."""

    code = "NOT_A_BASE_MODEL"


async def resolve_base_model(request: Request, model: str, principal: Principal) -> str:
    """The name of the model in a forge spec. A name that can change, such as NAME:latest, becomes a version."""
    if model.removesuffix(":latest") == tiny.NAME:
        return tiny.NAME
    if model in presets.names() or resolution.is_path(model):
        return model
    is_tuned = model.startswith(fine_tuned_names.PREFIX)
    if "/" in model and not is_tuned:
        return model  # on the Hugging Face hub
    try:
        resolved = await get_models(request).resolve(model, principal)
    except ModelNotFound:
        if ":" in model:
            raise
        return model  # also on the hub, where some models have no owner
    if isinstance(resolved.source, ModelFolder):
        raise NotABaseModel(f"'{model}' was never exported and cannot be fine-tuned. Use the model of a completed job.")
    return resolved.reference


def forge_spec(body: FineTuningJobRequest, base_model: str, principal: Principal) -> dict[str, Any]:
    method = body.method.type if body.method else "supervised"
    hyperparameters = body.requested_hyperparameters
    suffix = re.sub(r"[^a-z0-9_-]+", "-", body.suffix.lower()).strip("-") if body.suffix else ""
    spec: dict[str, Any] = {
        "name": _registered_name(base_model, suffix, principal),
        "base_model": base_model,
        "data": {"file": body.training_file},
        "method": method,
        "deploy": False,
        "keep_epochs": MAX_CHECKPOINTS,
        "metadata": body.metadata,
    }
    if suffix:
        spec["suffix"] = suffix
    if body.validation_file:
        spec["validation"] = {"file": body.validation_file}
    if body.seed is not None:
        spec["seed"] = body.seed
    if hyperparameters.n_epochs not in (None, "auto"):
        spec["epochs"] = hyperparameters.n_epochs
    if isinstance(hyperparameters.batch_size, int):
        spec |= {"batch_size": hyperparameters.batch_size, "gradient_accumulation": 1}
    if isinstance(hyperparameters.learning_rate_multiplier, float):
        spec["learning_rate"] = DEFAULT_LEARNING_RATE * hyperparameters.learning_rate_multiplier
    if isinstance(hyperparameters, DpoHyperparameters) and isinstance(hyperparameters.beta, float):
        spec["beta"] = hyperparameters.beta
    return spec


def _registered_name(base_model: str, suffix: str, principal: Principal) -> str:
    """The name in the model registry, such as ft-llama-3.2-1b-instruct-ada: a name belongs to one account."""
    last = base_model.rstrip("/").rpartition("/")[2].partition(":")[0].lower().removeprefix("ft-")
    slug = re.sub(r"[^a-z0-9._-]+", "-", last)
    room = 99 - len(suffix)
    maker = "" if principal.is_admin else f"-{principal.name.lower()}"[: room // 2]
    return f"ft-{slug.removesuffix(maker)}"[: room - len(maker)].rstrip("-._") + maker
