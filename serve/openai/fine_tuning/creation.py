"""From an OpenAI fine-tuning request to a forge job."""

import re
from typing import Any

from fastapi import Request

from cluster.errors import InvalidRequest
from cluster.ownership import Owner
from pipelines.training import presets
from pipelines.training.data import resolution
from pipelines.training.models import tiny
from pipelines.training.models.versions import ModelNotFound
from pipelines.training.spec import FineTuneSpec
from serve.engines.protocol import Folder
from serve.models import fine_tuned_names
from serve.models.dependencies import models_of
from serve.openai.fine_tuning.schemas import (
    DpoHyperparameters,
    JobCreation,
)

KEPT_EPOCHS = 3
"""OpenAI's."""
LEARNING_RATE: float = FineTuneSpec.model_fields["learning_rate"].default
ABOUT_DATA = {
    "empty_data",
    "file_not_found",
    "invalid_sample",
    "invalid_training_file",
    "nothing_to_train",
    "sample_too_long",
    "wrong_kind_of_data",
}
"""Errors of a training that come from its file."""


class MethodNotThere(InvalidRequest):
    """Models are fine-tuned by the methods supervised and dpo; reinforcement is not available."""

    code = "METHOD_NOT_AVAILABLE"


class NotABase(InvalidRequest):
    """No training can begin with this model."""

    code = "NOT_A_BASE_MODEL"


async def resolve_base_model(request: Request, model: str, owner: Owner) -> str:
    """What the forge calls it; of what changes its meaning, such as NAME:latest, what it means now."""
    if model.removesuffix(":latest") == tiny.NAME:
        return tiny.NAME
    if model in presets.names() or resolution.is_path(model):
        return model
    is_tuned = model.startswith(fine_tuned_names.PREFIX)
    if "/" in model and not is_tuned:
        return model  # of the Hugging Face hub
    try:
        meant = await models_of(request).resolve(model, owner)
    except ModelNotFound:
        if ":" in model:
            raise
        return model  # of the hub too, where some have no owner
    if isinstance(meant.source, Folder):
        raise NotABase(
            f"'{model}' was never exported, so no training can begin with it: take the model of a whole job."
        )
    return meant.reference


def forge_spec(wanted: JobCreation, base_model: str) -> dict[str, Any]:
    method = wanted.method.type if wanted.method else "supervised"
    told = wanted.wanted_hyperparameters
    suffix = re.sub(r"[^a-z0-9_-]+", "-", wanted.suffix.lower()).strip("-") if wanted.suffix else ""
    spec: dict[str, Any] = {
        "name": _registered_name(base_model, suffix),
        "base_model": base_model,
        "data": {"file": wanted.training_file},
        "method": method,
        "deploy": False,
        "keep_epochs": KEPT_EPOCHS,
        "metadata": wanted.metadata,
    }
    if suffix:
        spec["suffix"] = suffix
    if wanted.validation_file:
        spec["validation"] = {"file": wanted.validation_file}
    if wanted.seed is not None:
        spec["seed"] = wanted.seed
    if told.n_epochs not in (None, "auto"):
        spec["epochs"] = told.n_epochs
    if isinstance(told.batch_size, int):
        spec |= {"batch_size": told.batch_size, "gradient_accumulation": 1}
    if isinstance(told.learning_rate_multiplier, float):
        spec["learning_rate"] = LEARNING_RATE * told.learning_rate_multiplier
    if isinstance(told, DpoHyperparameters) and isinstance(told.beta, float):
        spec["beta"] = told.beta
    return spec


def _registered_name(base_model: str, suffix: str) -> str:
    """Under which versions of it are registered: ft-llama-3.2-1b-instruct."""
    last = base_model.rstrip("/").rpartition("/")[2].partition(":")[0].lower().removeprefix("ft-")
    slug = re.sub(r"[^a-z0-9._-]+", "-", last)
    return f"ft-{slug}"[: 99 - len(suffix)].rstrip("-._")
