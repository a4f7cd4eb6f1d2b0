"""The classes of registered models and their versions, their references (NAME:v3), and the registry's errors."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from cluster.errors import Conflict, Forbidden, NotFound, Unavailable

SERVED_ALIAS = "served"
REFERENCE_PATTERN = re.compile(r"([a-z0-9][a-z0-9._-]{0,99})(?::(?:latest|v([1-9]\d{0,8})))?")
JOB_ID_PATTERN = re.compile(r"[\w-]+")
Visibility = Literal["private", "shared", "served"]
"""private: its owner and administrators see it. shared: everybody, as its owner says. served: everybody, since it was
deployed once."""


class ModelNotFound(NotFound):
    """There is no such model."""

    code = "MODEL_NOT_FOUND"


class ModelNameTaken(Forbidden):
    """The name of a model belongs to the account that registered it first, and to administrators."""

    code = "MODEL_NAME_TAKEN"


class NoEarlierVersion(Conflict):
    """No other version was served before the current one."""

    code = "NO_EARLIER_VERSION"


class VersionDamaged(Unavailable):
    """The facts of a version in MLflow cannot be read."""

    code = "VERSION_DAMAGED"
    retryable = False


class VersionServed(Conflict):
    """A version that is served can be neither deleted nor made private."""

    code = "VERSION_SERVED"


class VersionInUse(Conflict):
    """A version that is the base of adapters cannot be deleted before them."""

    code = "VERSION_NEEDED"


class RegistryDisabled(Unavailable):
    """Models are registered in MLflow, which is disabled: set mlflow.enabled to true and restart Forgearr."""

    code = "MODEL_REGISTRY_OFF"
    retryable = False


@dataclass(frozen=True)
class ModelFile:
    name: str
    quantization: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class ModelDefaults:
    """A model's defaults for requests that do not set these values."""

    template: str = ""  # chat template in Jinja; empty: that of the file
    system: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict[str, Any])  # named as Ollama's options
    messages: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])  # the start of each conversation
    license: list[str] = field(default_factory=list[str])


@dataclass(frozen=True)
class Version:
    name: str
    number: int
    run_id: str  # of MLflow, which holds the files; empty: they are blobs
    files: list[ModelFile]  # the first one is served; empty: the adapter is served, on its base model
    adapter: ModelFile | None  # the adapter alone, as a GGUF LoRA
    base_model: str
    job_id: str  # the fine_tune that made it; empty: it was made from files
    export_job_id: str
    passed: bool | None  # the validation; None: not validated
    created_at: datetime
    reasons: list[str] = field(default_factory=list[str])  # why it did not pass
    validation: Mapping[str, Any] | None = None  # the gates of its validation, and the metrics that they look at
    defaults: ModelDefaults = field(default_factory=ModelDefaults)
    owner_id: str | None = None  # the user who trained it; None: an administrator or the platform
    visibility: Visibility = "shared"
    parent: str = ""  # the version whose files it shares
    comparison: Mapping[str, Any] | None = None  # with the version that was served when it was made

    @property
    def reference(self) -> str:
        return f"{self.name}:v{self.number}"

    @property
    def file(self) -> ModelFile:
        """The file that is served."""
        if self.files:
            return self.files[0]
        assert self.adapter is not None
        return self.adapter

    @property
    def is_adapter(self) -> bool:
        """Whether it is served as an adapter on a base model: a version, or forgearr/tiny."""
        return not self.files


@dataclass(frozen=True)
class Model:
    name: str
    served: Version | None
    versions: list[Version]  # newest first


def parse_reference(reference: str) -> tuple[str, int | None]:
    """The name of a model, and the number of the version if the reference has one."""
    match = REFERENCE_PATTERN.fullmatch(reference)
    if match is None:
        raise ModelNotFound(f"There is no model '{reference}'; versions are named NAME:latest or NAME:v3.")
    return match[1], int(match[2]) if match[2] else None


def unknown_model(name: str) -> ModelNotFound:
    """The error for a name without a version, or without one that the caller may see."""
    return ModelNotFound(f"There is no model '{name}'.")


def unknown_version(reference: str) -> ModelNotFound:
    """The error for a version that does not exist, or that the caller may not see."""
    name, number = parse_reference(reference)
    if number is None:
        return ModelNotFound(f"No version of a model '{name}' is served.")
    return ModelNotFound(f"There is no model version {name}:v{number}.")
